"""Token bytes, vocabulary matching, and the alignment of two tokenizations into units."""
