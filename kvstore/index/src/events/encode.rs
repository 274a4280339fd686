//! Our own moves as a batch of vLLM's events, in the form with named fields.
//!
//! Numbers take the fewest bytes. Fields that engines leave out when they say nothing are left out.

use super::{BLOCKS_MAX, EVENTS_MAX, TOKENS_MAX};

/// Where we have a block, in the words of engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// Host memory of the node.
    CpuPinned,
    /// A device of the node.
    Disk,
    /// A pool that several nodes share.
    External,
}

impl Medium {
    const fn name(self) -> &'static str {
        match self {
            Self::CpuPinned => "CPU_PINNED",
            Self::Disk => "DISK",
            Self::External => "EXTERNAL",
        }
    }
}

/// Something that we did with blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move<'a> {
    /// Blocks that follow each other are there now.
    Stored {
        /// The block before the first.
        parent: Option<u64>,
        /// At most [`BLOCKS_MAX`].
        blocks: &'a [u64],
        /// `block_size` for each block, or none; at most [`TOKENS_MAX`].
        tokens: &'a [u32],
        /// Tokens of a block.
        block_size: u32,
        /// Where.
        medium: Medium,
    },
    /// Blocks are gone from a medium.
    Removed {
        /// At most [`BLOCKS_MAX`].
        blocks: &'a [u64],
        /// From where.
        medium: Medium,
    },
    /// All are gone from everywhere.
    Cleared,
}

/// A batch of moves, in their order. `seconds` is the time of the batch; `rank` is nil where there is one publisher
/// only: vLLM takes a batch without it, Dynamo's indexer does not.
///
/// # Panics
/// If a list is longer than the decoder takes: whoever publishes more makes several batches.
pub fn encode(seconds: f64, moves: &[Move<'_>], rank: Option<u32>) -> Vec<u8> {
    assert!(moves.len() <= EVENTS_MAX, "a batch of more moves than a subscriber takes");
    let mut bytes = Vec::new();
    put_list(&mut bytes, 3);
    bytes.push(0xcb);
    bytes.extend(seconds.to_be_bytes());
    put_list(&mut bytes, moves.len());
    moves.iter().for_each(|change| put_move(&mut bytes, change));
    match rank {
        Some(rank) => put_number(&mut bytes, u64::from(rank)),
        None => bytes.push(0xc0),
    }
    bytes
}

fn put_move(bytes: &mut Vec<u8>, change: &Move<'_>) {
    match change {
        Move::Stored { parent, blocks, tokens, block_size, medium } => {
            put_event(bytes, "BlockStored", 7);
            put_blocks(bytes, blocks);
            put_text(bytes, "parent_block_hash");
            match parent {
                Some(parent) => put_number(bytes, *parent),
                None => bytes.push(0xc0),
            }
            assert!(tokens.len() <= TOKENS_MAX, "an event of more tokens than a subscriber takes");
            put_text(bytes, "token_ids");
            put_list(bytes, tokens.len());
            tokens.iter().for_each(|token| put_number(bytes, u64::from(*token)));
            put_text(bytes, "block_size");
            put_number(bytes, u64::from(*block_size));
            // Without a default in vLLM's own type: its decoder wants the field.
            put_text(bytes, "lora_id");
            bytes.push(0xc0);
            put_medium(bytes, *medium);
            put_text(bytes, "lora_name");
            bytes.push(0xc0);
        }
        Move::Removed { blocks, medium } => {
            put_event(bytes, "BlockRemoved", 2);
            put_blocks(bytes, blocks);
            put_medium(bytes, *medium);
        }
        Move::Cleared => put_event(bytes, "AllBlocksCleared", 0),
    }
}

/// The head of an event of so many fields.
fn put_event(bytes: &mut Vec<u8>, name: &str, fields: u8) {
    // A map of less than 16 pairs.
    bytes.push(0x80 | (fields + 1));
    put_text(bytes, "type");
    put_text(bytes, name);
}

fn put_blocks(bytes: &mut Vec<u8>, blocks: &[u64]) {
    assert!(blocks.len() <= BLOCKS_MAX, "an event of more blocks than a subscriber takes");
    put_text(bytes, "block_hashes");
    put_list(bytes, blocks.len());
    blocks.iter().for_each(|block| put_number(bytes, *block));
}

fn put_medium(bytes: &mut Vec<u8>, medium: Medium) {
    put_text(bytes, "medium");
    put_text(bytes, medium.name());
}

/// One of our own words, all of less than 32 bytes.
fn put_text(bytes: &mut Vec<u8>, text: &str) {
    let length = u8::try_from(text.len()).expect("our own words are short");
    assert!(length < 32, "a word that needs a longer head");
    bytes.push(0xa0 | length);
    bytes.extend_from_slice(text.as_bytes());
}

fn put_list(bytes: &mut Vec<u8>, items: usize) {
    let items = u32::try_from(items).expect("lists are checked against the decoder's limits");
    match (u8::try_from(items), u16::try_from(items)) {
        (Ok(few), _) if few < 16 => bytes.push(0x90 | few),
        (_, Ok(short)) => {
            bytes.push(0xdc);
            bytes.extend(short.to_be_bytes());
        }
        (_, Err(_)) => {
            bytes.push(0xdd);
            bytes.extend(items.to_be_bytes());
        }
    }
}

fn put_number(bytes: &mut Vec<u8>, number: u64) {
    if let Ok(byte) = u8::try_from(number) {
        if byte >= 0x80 {
            bytes.push(0xcc);
        }
        bytes.push(byte);
    } else if let Ok(short) = u16::try_from(number) {
        bytes.push(0xcd);
        bytes.extend(short.to_be_bytes());
    } else if let Ok(word) = u32::try_from(number) {
        bytes.push(0xce);
        bytes.extend(word.to_be_bytes());
    } else {
        bytes.push(0xcf);
        bytes.extend(number.to_be_bytes());
    }
}
