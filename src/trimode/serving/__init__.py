"""HTTP: requests in, jobs to whoever runs the model, updates back as they come."""
