"""Databases of images: reading, decoding, transforming and prefetching batches; converting images into databases."""
