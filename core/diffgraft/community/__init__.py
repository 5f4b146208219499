"""For plugin authors before publishing: a skeleton, the rules, the quality scale, the catalogue."""
