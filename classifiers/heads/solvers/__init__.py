"""The numerical part of heads: what is minimised, decomposed or summed."""
