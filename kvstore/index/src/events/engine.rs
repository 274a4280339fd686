//! Event batches of vLLM and SGLang: `[seconds, [events], rank]`.
//!
//! An event is a map with its name under `type`, or, from older engines, a list that begins with its name
//! and has its fields in a fixed order. Fields may be missing at the end of a list, and anywhere in a map.

use super::msgpack::{Reader, Skipped, Value};
use super::{
    BATCH_BYTES_MAX, BLOCKS_MAX, BadEvents, Content, EVENTS_MAX, Event, Identity, Stored, TOKENS_MAX,
};
use crate::hashes::vllm_event_number;
use crate::ids::TierSet;

/// What one step of an engine did.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// When, in seconds by the engine's clock. Not checked; not for ordering.
    pub seconds: f64,
    /// In the order in which they are to be applied.
    pub events: Vec<Event>,
    /// The engine's rank among data-parallel ones.
    pub rank: Option<u32>,
}

/// Reads one batch.
///
/// # Errors
/// Says what is wrong with the bytes, and where.
pub fn decode(bytes: &[u8]) -> Result<Batch, BadEvents> {
    let mut reader = reader_of(bytes)?;
    let (at, fields) = (reader.at(), list(&mut reader, "a batch", usize::MAX)?);
    if fields < 2 {
        return Err(BadEvents::Kind { at, wanted: "a batch of time and events" });
    }
    let seconds = seconds(&mut reader)?;
    let count = list(&mut reader, "events", EVENTS_MAX)?;
    let mut events = Vec::new();
    for _ in 0..count {
        events.extend(event(&mut reader)?);
    }
    let rank = if fields > 2 { optional(&mut reader, small)? } else { None };
    for _ in 3..fields {
        reader.skip()?;
    }
    reader.end()?;
    Ok(Batch { seconds, events, rank })
}

/// A reader, if there are not too many bytes.
pub(super) fn reader_of(bytes: &[u8]) -> Result<Reader<'_>, BadEvents> {
    if bytes.len() > BATCH_BYTES_MAX {
        return Err(BadEvents::TooMany { at: 0, what: "bytes", limit: BATCH_BYTES_MAX });
    }
    Ok(Reader::new(bytes))
}

/// The fields of an event, as far as they were there.
#[derive(Default)]
struct Fields {
    blocks: Option<Vec<u64>>,
    parent: Option<u64>,
    tokens: Vec<u32>,
    block_size: Option<u32>,
    medium: Option<TierSet>,
    group: Option<u32>,
    more_than_tokens: bool,
}

/// None for an event that means nothing.
fn event(reader: &mut Reader<'_>) -> Result<Option<Event>, BadEvents> {
    let at = reader.at();
    let mut fields = Fields::default();
    let name = match reader.next()? {
        Value::List(count) if count > 0 => {
            let name = Name::of(reader.at(), text(reader)?)?;
            for place in 1..count {
                fields.read(reader, name.field_at(place, reader)?)?;
            }
            name
        }
        Value::Map(count) => {
            let mut name = None;
            for _ in 0..count {
                match text(reader)? {
                    b"type" => name = Some(Name::of(reader.at(), text(reader)?)?),
                    field => fields.read(reader, field)?,
                }
            }
            name.ok_or(BadEvents::Missing { at: reader.at(), field: "type" })?
        }
        _ => return Err(BadEvents::Kind { at, wanted: "an event" }),
    };
    fields.event(name, reader.at())
}

#[derive(Clone, Copy)]
enum Name {
    Stored,
    Removed,
    Cleared,
    /// A publisher's own note that nothing happened.
    Ignored,
}

impl Name {
    fn of(at: usize, name: &[u8]) -> Result<Self, BadEvents> {
        match name {
            b"BlockStored" => Ok(Self::Stored),
            b"BlockRemoved" => Ok(Self::Removed),
            b"AllBlocksCleared" => Ok(Self::Cleared),
            b"Ignored" => Ok(Self::Ignored),
            _ => Err(unknown(at, "the event", name)),
        }
    }

    /// The field at a place of a list; an empty name for one that is skipped. Some publishers put pictures
    /// before the group, so the group is the first of two places that is a number.
    fn field_at(self, place: usize, reader: &Reader<'_>) -> Result<&'static [u8], BadEvents> {
        const STORED: [&[u8]; 8] = [
            b"block_hashes",
            b"parent_block_hash",
            b"token_ids",
            b"block_size",
            b"lora_id",
            b"medium",
            b"lora_name",
            b"extra_keys",
        ];
        const REMOVED: [&[u8]; 3] = [b"block_hashes", b"medium", b"group_idx"];
        Ok(match self {
            Self::Stored if place <= STORED.len() => STORED[place - 1],
            Self::Stored if place == 9 => match reader.peek()? {
                Value::Unsigned(_) => b"group_idx",
                _ => b"block_mm_infos",
            },
            Self::Stored if place == 10 && matches!(reader.peek()?, Value::Unsigned(_)) => b"group_idx",
            Self::Removed if place <= REMOVED.len() => REMOVED[place - 1],
            Self::Stored | Self::Removed | Self::Cleared | Self::Ignored => b"",
        })
    }
}

impl Fields {
    fn read(&mut self, reader: &mut Reader<'_>, field: &[u8]) -> Result<(), BadEvents> {
        match field {
            b"block_hashes" => self.blocks = optional(reader, hashes)?,
            b"parent_block_hash" => self.parent = optional(reader, hash)?,
            b"token_ids" => self.read_tokens(reader)?,
            b"block_size" => self.block_size = optional(reader, small)?,
            b"medium" => self.medium = optional(reader, medium)?.flatten(),
            b"group_idx" => self.group = optional(reader, small)?,
            b"lora_id" | b"lora_name" | b"extra_keys" | b"cache_salt" | b"block_mm_infos" => {
                self.more_than_tokens |= reader.skip()? == Skipped::Something;
            }
            _ => {
                reader.skip()?;
            }
        }
        Ok(())
    }

    /// Tokens, or pairs of a token and the one after it.
    fn read_tokens(&mut self, reader: &mut Reader<'_>) -> Result<(), BadEvents> {
        if reader.peek()? == Value::Nil {
            reader.skip()?;
            return Ok(());
        }
        let count = list(reader, "tokens", TOKENS_MAX)?;
        self.tokens = Vec::with_capacity(count);
        for _ in 0..count {
            let at = reader.at();
            if let Value::List(items) = reader.peek()? {
                if items != 2 {
                    return Err(BadEvents::Kind { at, wanted: "a token or a pair of tokens" });
                }
                reader.next()?;
                self.tokens.push(small(reader)?);
                small(reader)?;
                self.more_than_tokens = true;
            } else {
                self.tokens.push(small(reader)?);
            }
        }
        Ok(())
    }

    fn event(self, name: Name, at: usize) -> Result<Option<Event>, BadEvents> {
        // Engines that know one medium do not name it.
        let tiers = self.medium.unwrap_or(TierSet::HBM);
        let blocks = self.blocks.ok_or(BadEvents::Missing { at, field: "block_hashes" });
        Ok(match name {
            Name::Stored => {
                let blocks = blocks?;
                let block_size = self.block_size.ok_or(BadEvents::Missing { at, field: "block_size" })?;
                Some(Event::Stored(Stored {
                    parent: self.parent,
                    content: content(&blocks, self.tokens, block_size),
                    blocks,
                    block_size,
                    tiers,
                    group: self.group,
                    identity: if self.more_than_tokens { Identity::MoreThanTokens } else { Identity::Tokens },
                }))
            }
            Name::Removed => Some(Event::Removed { blocks: blocks?, tiers, group: self.group }),
            Name::Cleared => Some(Event::Cleared),
            Name::Ignored => None,
        })
    }
}

/// Tokens count only if each block has its own: an engine may leave out blocks in the middle that its
/// attention does not need, and then nobody can tell which.
fn content(blocks: &[u64], tokens: Vec<u32>, block_size: u32) -> Content {
    let each = usize::try_from(block_size).unwrap_or(usize::MAX);
    if !tokens.is_empty() && blocks.len().checked_mul(each) == Some(tokens.len()) {
        Content::Tokens(tokens)
    } else {
        Content::Unknown
    }
}

/// None for an empty name. Whatever is slower than host memory is [`TierSet::NVME`].
fn medium(reader: &mut Reader<'_>) -> Result<Option<TierSet>, BadEvents> {
    let at = reader.at();
    match text(reader)? {
        b"" => Ok(None),
        b"GPU" | b"DEVICE" => Ok(Some(TierSet::HBM)),
        b"CPU" | b"CPU_PINNED" | b"CPU_TIER1" => Ok(Some(TierSet::PINNED)),
        b"DISK" | b"NVME" | b"STORAGE" | b"CPU_TIER2" => Ok(Some(TierSet::NVME)),
        b"EXTERNAL" | b"NETWORK" | b"REMOTE" | b"SHARED" => Ok(Some(TierSet::NVME)),
        other => Err(unknown(at, "the medium", other)),
    }
}

/// A list of hashes.
pub(super) fn hashes(reader: &mut Reader<'_>) -> Result<Vec<u64>, BadEvents> {
    let count = list(reader, "blocks", BLOCKS_MAX)?;
    let mut hashes = Vec::with_capacity(count);
    for _ in 0..count {
        hashes.push(hash(reader)?);
    }
    Ok(hashes)
}

/// A number of 64 bits, signed or not, or the bytes of a longer hash, of which the last eight count.
pub(super) fn hash(reader: &mut Reader<'_>) -> Result<u64, BadEvents> {
    let at = reader.at();
    match reader.next()? {
        Value::Unsigned(number) => Ok(number),
        Value::Negative(number) => Ok(number.cast_unsigned()),
        Value::Bytes(bytes) if bytes.len() >= 8 => Ok(vllm_event_number(bytes)),
        _ => Err(BadEvents::Kind { at, wanted: "a block's hash" }),
    }
}

fn seconds(reader: &mut Reader<'_>) -> Result<f64, BadEvents> {
    let at = reader.at();
    match reader.next()? {
        Value::Float(seconds) => Ok(seconds),
        // Whole seconds need 33 bits; the next 20 are exact as well.
        #[expect(clippy::cast_precision_loss, reason = "a time, of which nothing hangs on the last bits")]
        Value::Unsigned(seconds) => Ok(seconds as f64),
        _ => Err(BadEvents::Kind { at, wanted: "a time in seconds" }),
    }
}

/// None for nil.
pub(super) fn optional<'a, T>(
    reader: &mut Reader<'a>,
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, BadEvents>,
) -> Result<Option<T>, BadEvents> {
    if reader.peek()? == Value::Nil {
        reader.next()?;
        return Ok(None);
    }
    read(reader).map(Some)
}

pub(super) fn small(reader: &mut Reader<'_>) -> Result<u32, BadEvents> {
    let at = reader.at();
    let number = unsigned(reader)?;
    u32::try_from(number).map_err(|_| BadEvents::Kind { at, wanted: "a number of 32 bits" })
}

pub(super) fn unsigned(reader: &mut Reader<'_>) -> Result<u64, BadEvents> {
    let at = reader.at();
    match reader.next()? {
        Value::Unsigned(number) => Ok(number),
        _ => Err(BadEvents::Kind { at, wanted: "a number" }),
    }
}

pub(super) fn text<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], BadEvents> {
    let at = reader.at();
    match reader.next()? {
        Value::Text(text) => Ok(text),
        _ => Err(BadEvents::Kind { at, wanted: "a text" }),
    }
}

pub(super) fn list(reader: &mut Reader<'_>, what: &'static str, limit: usize) -> Result<usize, BadEvents> {
    let at = reader.at();
    match reader.next()? {
        Value::List(count) if count <= limit => Ok(count),
        Value::List(_) => Err(BadEvents::TooMany { at, what, limit }),
        _ => Err(BadEvents::Kind { at, wanted: what }),
    }
}

pub(super) fn unknown(at: usize, what: &'static str, word: &[u8]) -> BadEvents {
    let shown = &word[..word.len().min(64)];
    BadEvents::Unknown { at, what, word: String::from_utf8_lossy(shown).into_owned() }
}
