"""Training: objectives, data, the loop for one device or many, pretraining and fine-tuning."""
