"""What is said and written of a stack: which plugins are meant, files and presets of them, what they did in a run. Nothing runs here."""
