"""What answers are compared with: goldens that transformers made, random configs, exact bits."""
