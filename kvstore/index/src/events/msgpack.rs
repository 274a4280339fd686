//! Reads `MessagePack`, value by value, out of a slice.
//!
//! Promises: never panics; a count that it returns is at most the number of bytes that are left, as an item
//! takes at least one; what is skipped is never deeper than [`DEPTH_MAX`].

use super::{BadEvents, DEPTH_MAX};

/// One value; of a list or map only its head, whose items follow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Nil,
    Bool,
    Unsigned(u64),
    /// Below zero.
    Negative(i64),
    Float(f64),
    Text(&'a [u8]),
    Bytes(&'a [u8]),
    List(usize),
    /// Pairs.
    Map(usize),
    Extension,
}

/// Whether a skipped value said anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Skipped {
    /// Nil, an empty text, or containers of nothing else.
    Nothing,
    Something,
}

/// Where in the bytes we are.
#[derive(Clone)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// What was read since `start`.
    pub(super) fn since(&self, start: usize) -> &'a [u8] {
        &self.bytes[start..self.at]
    }

    /// That nothing is left.
    pub(super) fn end(&self) -> Result<(), BadEvents> {
        match self.left() {
            0 => Ok(()),
            bytes => Err(BadEvents::Left { bytes }),
        }
    }

    pub(super) fn next(&mut self) -> Result<Value<'a>, BadEvents> {
        let [head] = self.array()?;
        Ok(match head {
            0x00..=0x7f => Value::Unsigned(u64::from(head)),
            0x80..=0x8f => self.map(u64::from(head & 0x0f))?,
            0x90..=0x9f => self.list(u64::from(head & 0x0f))?,
            0xa0..=0xbf => Value::Text(self.take(u64::from(head & 0x1f))?),
            0xc0 => Value::Nil,
            0xc2 | 0xc3 => Value::Bool,
            0xc4..=0xc6 => {
                let length = self.unsigned(head - 0xc4)?;
                Value::Bytes(self.take(length)?)
            }
            0xc7..=0xc9 => {
                let length = self.unsigned(head - 0xc7)?;
                self.extension(length)?
            }
            0xca => Value::Float(f64::from(f32::from_be_bytes(self.array()?))),
            0xcb => Value::Float(f64::from_be_bytes(self.array()?)),
            0xcc..=0xcf => Value::Unsigned(self.unsigned(head - 0xcc)?),
            0xd0 => integer(i64::from(i8::from_be_bytes(self.array()?))),
            0xd1 => integer(i64::from(i16::from_be_bytes(self.array()?))),
            0xd2 => integer(i64::from(i32::from_be_bytes(self.array()?))),
            0xd3 => integer(i64::from_be_bytes(self.array()?)),
            0xd4..=0xd8 => self.extension(1 << (head - 0xd4))?,
            0xd9..=0xdb => {
                let length = self.unsigned(head - 0xd9)?;
                Value::Text(self.take(length)?)
            }
            0xdc | 0xdd => {
                let items = self.unsigned(head - 0xdb)?;
                self.list(items)?
            }
            0xde | 0xdf => {
                let pairs = self.unsigned(head - 0xdd)?;
                self.map(pairs)?
            }
            0xe0..=0xff => integer(i64::from(i8::from_be_bytes([head]))),
            0xc1 => return Err(BadEvents::Kind { at: self.at - 1, wanted: "a MessagePack value" }),
        })
    }

    /// The next value without taking it.
    pub(super) fn peek(&self) -> Result<Value<'a>, BadEvents> {
        self.clone().next()
    }

    /// Reads over a value, whatever it is.
    pub(super) fn skip(&mut self) -> Result<Skipped, BadEvents> {
        self.skip_within(DEPTH_MAX)
    }

    fn skip_within(&mut self, depth: usize) -> Result<Skipped, BadEvents> {
        let start = self.at;
        let (items, keys) = match self.next()? {
            Value::Nil | Value::Text([]) => return Ok(Skipped::Nothing),
            Value::List(items) => (items, 0),
            Value::Map(pairs) => (pairs, 1),
            Value::Bool
            | Value::Unsigned(_)
            | Value::Negative(_)
            | Value::Float(_)
            | Value::Text(_)
            | Value::Bytes(_)
            | Value::Extension => return Ok(Skipped::Something),
        };
        let Some(depth) = depth.checked_sub(1) else {
            return Err(BadEvents::TooMany { at: start, what: "levels", limit: DEPTH_MAX });
        };
        let mut all = Skipped::Nothing;
        for _ in 0..items {
            for _ in 0..keys {
                self.skip_within(depth)?;
            }
            if self.skip_within(depth)? == Skipped::Something {
                all = Skipped::Something;
            }
        }
        Ok(all)
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn list(&self, items: u64) -> Result<Value<'a>, BadEvents> {
        self.count(items, 1).map(Value::List)
    }

    fn map(&self, pairs: u64) -> Result<Value<'a>, BadEvents> {
        self.count(pairs, 2).map(Value::Map)
    }

    /// `count` as a number of things of at least `bytes` each; they must fit into what is left.
    fn count(&self, count: u64, bytes: usize) -> Result<usize, BadEvents> {
        usize::try_from(count)
            .ok()
            .filter(|count| *count <= self.left() / bytes)
            .ok_or(BadEvents::Cut { at: self.bytes.len() })
    }

    fn extension(&mut self, length: u64) -> Result<Value<'a>, BadEvents> {
        let [_kind] = self.array()?;
        self.take(length)?;
        Ok(Value::Extension)
    }

    /// A number of 1, 2, 4 or 8 bytes: two to the power of `log`.
    fn unsigned(&mut self, log: u8) -> Result<u64, BadEvents> {
        let bytes = self.take(1 << log)?;
        Ok(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadEvents> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let found = rest.first_chunk().ok_or(BadEvents::Cut { at: self.bytes.len() })?;
        self.at += N;
        Ok(*found)
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], BadEvents> {
        let length = self.count(length, 1)?;
        let taken = &self.bytes[self.at..self.at + length];
        self.at += length;
        Ok(taken)
    }
}

/// Writers may store a number above zero in a signed form.
fn integer(number: i64) -> Value<'static> {
    u64::try_from(number).map_or(Value::Negative(number), Value::Unsigned)
}
