"""Figures, diagrams and the page of a run. Needs metrics and sampling."""
