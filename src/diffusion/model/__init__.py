"""Noise schedules, forward process, parameterisation, network, model files. Needs the ground alone."""
