"""Caches: what a teacher said of texts, exported from a run as a data set, and read in the place of the teacher."""
