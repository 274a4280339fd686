//! Which sealed blocks are worth a write.
