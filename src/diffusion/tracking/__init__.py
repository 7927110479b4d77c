"""The record of a run: a local journal, and its copy in MLflow. Needs the ground alone."""
