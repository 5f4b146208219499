"""Many prompts: read as a stream, drawn here or by workers on a Ray cluster, each result in its file, whole or not there."""
