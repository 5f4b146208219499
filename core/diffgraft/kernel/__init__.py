"""One call's life: from `load_pipeline` to the picture, and nothing else. Its guided tour is core/README.md."""
