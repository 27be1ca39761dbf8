"""A trained student, or a teacher, becomes a bundle."""
