"""The routes, a file per noun. They read requests and write answers; what is done lies in Service and galleries."""
