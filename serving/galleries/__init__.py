"""Keep enrolled templates: the GalleryStore protocol, encryption, audit and the stores. Imports core, of serving."""
