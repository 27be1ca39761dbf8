"""Read requests and write answers, a file per noun. Imports api's own modules and below."""
