"""The pixel path: from the bytes of an image file to the pixels that a network takes."""
