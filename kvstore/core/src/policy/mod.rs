//! What to keep: pure functions and bounded tables that turn what was asked for
//! into a choice. They start nothing, so another policy can stand in their place.

pub(crate) mod choice;
pub(crate) mod class;
pub(crate) mod duel;
pub(crate) mod ghost;
pub(crate) mod hazards;
pub(crate) mod history;
pub(crate) mod queues;
pub(crate) mod s3fifo;

pub(crate) use choice::{Choice, ChunkFacts, cheapest_chunk};
