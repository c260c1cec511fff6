"""The command lines of merge.py and performAIM.py: flags and YAML to one typed run, and its execution."""
