"""Backbone and head trained together, on the same split and with the same scores as heads."""
