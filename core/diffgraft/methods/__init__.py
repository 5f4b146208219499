"""What a method may use beside its hooks: predictions, conditioning, decoding, gradients, artefacts, searches, rewards."""
