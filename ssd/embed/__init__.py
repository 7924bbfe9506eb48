"""Features of images by a frozen extractor."""
