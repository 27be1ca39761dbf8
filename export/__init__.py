"""Turn a trained student, or a teacher, into a bundle. Imports toolkit, distill included; never serving."""
