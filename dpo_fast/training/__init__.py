"""What a step of training needs beside the model and the loss."""
