//! What engines and other routers say of their blocks: decoded from their bytes, and our own moves encoded
//! the way that they read.
//!
//! Reads the event batches of vLLM and SGLang ([`decode`]) and the `RouterEvent`s of Dynamo
//! ([`decode_dynamo`]), and writes batches as vLLM does ([`encode`]). All are `MessagePack`.
//!
//! Promises: no bytes make it panic; a list is stored only if the input is long enough to hold its items, so that
//! the answer takes at most sixteen times the bytes of the input; fields that it does not know are
//! skipped. A batch is decoded whole or not at all.
//!
//! Leaves to others: sockets, sequence numbers ([`crate::Stream`]), and the keys that the hashes are aliases of.

mod dynamo;
mod encode;
mod engine;
mod msgpack;
#[cfg(test)]
mod tests;

use crate::ids::TierSet;

pub use dynamo::{Domain, RouterEvent, decode_dynamo};
pub use encode::{Medium, Move, encode};
pub use engine::{Batch, decode};

/// Longest input: a step that stores ten million tokens takes about 50 MB.
pub const BATCH_BYTES_MAX: usize = 64 << 20;
/// Most events of a batch.
pub const EVENTS_MAX: usize = 1 << 16;
/// Most blocks of an event.
pub const BLOCKS_MAX: usize = 1 << 20;
/// Most tokens of an event.
pub const TOKENS_MAX: usize = 1 << 24;
/// Deepest nesting of a field that is skipped.
pub const DEPTH_MAX: usize = 16;

/// What happened to blocks of one publisher. Blocks are named by the publisher's 64-bit hashes; the key of
/// one is [`crate::Key::from_alias`] of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Blocks that follow each other are there.
    Stored(Stored),
    /// Blocks are gone from these tiers; they may be left in others.
    Removed {
        /// The blocks, in no order.
        blocks: Vec<u64>,
        /// Where they are gone from.
        tiers: TierSet,
        /// The publisher's group of layers, if it has several.
        group: Option<u32>,
    },
    /// The publisher holds nothing any more.
    Cleared,
}

/// Blocks that follow each other, of one tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The block before the first; none if a prompt begins here, or if the publisher does not say.
    pub parent: Option<u64>,
    /// The blocks in their order; the list may be empty.
    pub blocks: Vec<u64>,
    /// What is in them.
    pub content: Content,
    /// Tokens of a block; 0 if the publisher does not say.
    pub block_size: u32,
    /// Where they are.
    pub tiers: TierSet,
    /// The publisher's group of layers, if it has several.
    pub group: Option<u32>,
    /// What makes the blocks what they are.
    pub identity: Identity,
}

/// What a publisher says of the inside of blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing that says what is in each block.
    Unknown,
    /// Their tokens, [`Stored::block_size`] for each block.
    Tokens(Vec<u32>),
    /// A hash of the tokens of each block alone, by Dynamo's rule.
    Hashes(Vec<u64>),
}

/// Whether other requests with these tokens may use the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// Equal tokens mean equal blocks.
    Tokens,
    /// An adapter, a salt, a picture or the token after the block counts as well: what is recomputed from the
    /// tokens alone must not find these blocks.
    MoreThanTokens,
}

/// Why bytes are no events. Nothing of them was used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadEvents {
    /// They end in the middle, or say that more follows than there is.
    #[error("the bytes end at {at}, in the middle of a value")]
    Cut {
        /// Bytes from the start.
        at: usize,
    },
    /// Something follows the last value.
    #[error("{bytes} bytes follow the batch")]
    Left {
        /// So many.
        bytes: usize,
    },
    /// Another kind of value was due.
    #[error("at byte {at}: {wanted} was expected")]
    Kind {
        /// Where the value begins.
        at: usize,
        /// What it should be.
        wanted: &'static str,
    },
    /// More of something than is taken.
    #[error("at byte {at}: more than {limit} {what}")]
    TooMany {
        /// Where the value begins.
        at: usize,
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// A field without which an event says nothing.
    #[error("the event that ends at byte {at} has no `{field}`")]
    Missing {
        /// Where the event ends.
        at: usize,
        /// Its name.
        field: &'static str,
    },
    /// A word that is none of those we know: of a kind of event, a medium, a tier or a domain.
    #[error("at byte {at}: {what} `{word}` is unknown")]
    Unknown {
        /// Where the word begins.
        at: usize,
        /// What it names.
        what: &'static str,
        /// The word, cut to 64 bytes.
        word: String,
    },
}
