"""Fine-tuning: backbone and head trained end to end, on the same split and scores as heads on cached features."""
