"""What is installed and what it declares: packages, plugins, families, knobs, effects. Nothing here runs. Its tour is core/README.md."""
