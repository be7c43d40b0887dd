"""The benchmark: times a decoder's passes and cycles, and compares its modes to the bit."""
