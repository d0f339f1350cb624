"""The experts' products as Triton kernels. Importing this imports triton: only who has chosen it does."""
