"""The benchmark: times a decoder's passes and cycles, and compares its modes to the bit.

    python -m orthrus_fast.bench --shape 8B --json result.json

The JSON file is rewritten after each part, so that an interrupted run keeps the finished ones.
"""
