"""YAML to a validated Recipe; every problem reported at once, with its file, line, key and nearest valid spelling."""
