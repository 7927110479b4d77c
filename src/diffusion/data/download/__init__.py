"""CIFAR-10 from the first source that works, verified."""
