"""Turn command lines into calls: one file a command. Imports everything of the toolkit; nothing imports it."""
