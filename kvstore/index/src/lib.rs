//! Who holds which block, in which tier: one index for all holders and all tiers.
//!
//! A **run** is up to 64 consecutive blocks of one chain. It stores each key once, and for each holder
//! one record: a bit for each block and tier, a size class and a heat. So a look-up costs per run and
//! holder, not per block, and moving a block between tiers flips two bits.
//!
//! Promises: readers never wait for a writer, not even for one that was stopped in the middle of a change;
//! memory stays within [`Limits`], by forgetting what is coldest; the same calls give the same answers.
//! What a reader sees while a writer is at work may be older or newer by a change, or lack a holder that
//! is just being moved; it never names a holder for a block that the holder did not have.
//!
//! Leaves to others: where events come from and in which order they are applied, what a holder is, and
//! what it costs to fetch from it. Keys are those of a chain: equal keys mean equal tokens before them too. Who says that
//! a block goes on from another than it does may have it remembered twice, and one of the two until it is cleared or
//! forgotten.

mod crowd;
mod directory;
pub mod events;
mod find;
pub mod hashes;
mod ids;
mod index;
mod listing;
mod plan;
mod pool;
mod recent;
mod room;
mod run;
mod snapshot;
mod stream;
mod warmest;
mod write;

pub use find::{Found, Held, Span};
pub use ids::{HOLDERS_MAX, HolderId, Key, Limits, Refused, SizeClass, Tier, TierSet};
pub use index::{Changes, Counts, Index};
pub use plan::{Piece, Plan, source_plan};
pub use snapshot::BadSnapshot;
pub use stream::{Stream, Tally, Verdict};
pub use warmest::{HOLDERS_SHOWN, Stretch};
