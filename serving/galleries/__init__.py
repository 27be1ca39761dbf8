"""What is enrolled: galleries, subjects, templates, and where they are kept."""
