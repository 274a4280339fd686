//! What to keep: pure functions and bounded tables that turn what was asked for
//! into a choice. They start nothing, so another policy can stand in their place.
//!
//! [`choice`] picks among candidates of a live tier. [`queues`] keeps a tier's
//! evictable blocks in order; [`hazards`] learns how soon blocks of a class come
//! back; [`ghost`] remembers more blocks than a tier holds and carries the two
//! shadows that [`duel`] compares. [`curve`] says what other sizes would bring,
//! [`admission`] what is worth a write. [`replay`] runs all of it over a trace.

pub(crate) mod admission;
pub(crate) mod choice;
pub(crate) mod class;
pub(crate) mod curve;
pub(crate) mod curves;
pub(crate) mod duel;
pub(crate) mod ghost;
pub(crate) mod hazards;
pub(crate) mod queues;
pub(crate) mod replay;
pub(crate) mod s3fifo;

pub use admission::{Admit, Devices, WriteBudget};
pub use curve::{Asked, CURVE_POINTS, Curve, CurvePoint, Lookup};
pub use curves::Curves;
pub use duel::{Duel, Leader};
pub use ghost::Step;
pub use replay::{Costs, Replay, Served};

/// Gone blocks whose past is remembered, for each that a small tier holds, and at least.
pub(crate) const PASTS_REACH: u32 = 2;
pub(crate) const PASTS_MIN: u32 = 4096;

pub(crate) use choice::{Choice, ChunkFacts, cheapest_chunk};
