"""The bodies of the stages: they alone open a tracker, call the library and write outputs that dvc.yaml names."""
