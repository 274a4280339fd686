//! The two messages of the lane with hundreds of parts: what names many keys, and what a lease granted.
//!
//! The generated code makes every key and every granted block an object with parts of its own, measured, copied and
//! counted one by one, which costs more than the daemon takes to find the blocks. Keys are encoded once here, as they
//! come from the caller, and grants are read into plain numbers, or left as they came. What is not exactly as the daemon
//! encodes it is left to the generated code.

use bytes::{BufMut, Bytes};
use prost::encoding::{encode_varint, encoded_len_varint};
use prost::{DecodeError, Message};

use terrace_core::BlockId;
use terrace_lane::{LaneMessage, block_ids, varint};
use terrace_proto::KEY_BYTES_MAX;
use terrace_proto::v1::lane_request::Op;
use terrace_proto::v1::lane_response::Result as Answer;
use terrace_proto::v1::{self, GrantOutcome, LaneResponse, MissReason};

use crate::error::ClientError;
use crate::grants::{BLOCK_ID_BYTES, Grant, Grants};
use crate::space::Space;

/// Tags: the number of a field and what follows it.
const ID: u8 = 1 << 3;
const EXISTS: u8 = 4 << 3 | 2;
const EXISTS_KEYS: u8 = 2 << 3 | 2;
const LEASE: u8 = 6 << 3 | 2;
const LEASE_KEYS: u8 = 4 << 3 | 2;
const EXISTS_IDS: u8 = 4 << 3 | 2;
const LEASE_IDS: u8 = 12 << 3 | 2;
const GRANTS: u8 = 3 << 3 | 2;

/// Keys with the length of each before it, checked.
#[derive(Debug)]
pub(crate) struct Keys {
    bytes: Vec<u8>,
    count: usize,
}

impl Keys {
    /// Of a request for at most `limit` blocks.
    pub(crate) fn of<K: AsRef<[u8]>>(keys: &[K], limit: usize) -> Result<Self, ClientError> {
        check(keys, limit)?;
        let mut bytes = Vec::with_capacity(keys.iter().map(|key| 1 + key.as_ref().len()).sum());
        for key in keys.iter().map(AsRef::as_ref) {
            bytes.push(u8::try_from(key.len()).expect("the length of a key is one byte"));
            bytes.extend_from_slice(key);
        }
        Ok(Self { bytes, count: keys.len() })
    }

    fn list(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = &self.bytes[..];
        std::iter::from_fn(move || {
            let (length, after) = rest.split_first()?;
            let (key, after) = after.split_at(usize::from(*length));
            rest = after;
            Some(key)
        })
    }

    /// For the generated messages.
    pub(crate) fn to_wire(&self) -> Vec<Bytes> {
        self.list().map(Bytes::copy_from_slice).collect()
    }
}

/// How a look-up or a lease names its blocks.
#[derive(Debug)]
pub(crate) enum Named {
    Keys(Keys),
    /// The ids of the blocks, 16 bytes each: hashed here, by whoever waits for the answer.
    Blocks(Bytes),
}

impl Named {
    /// Of blocks of one space, whose daemon takes their ids.
    pub(crate) fn blocks<K: AsRef<[u8]>>(
        space: &Space,
        keys: &[K],
        limit: usize,
    ) -> Result<Self, ClientError> {
        check(keys, limit)?;
        let blocks = block_ids(space.tenant_key(), space.id(), keys);
        let mut bytes = Vec::with_capacity(blocks.len() * BLOCK_ID_BYTES);
        blocks.iter().for_each(|block| bytes.extend_from_slice(&block.to_bytes()));
        Ok(Self::Blocks(bytes.into()))
    }

    /// The ids of the blocks, if it has them.
    pub(crate) fn ids(&self) -> Option<Bytes> {
        match self {
            Self::Keys(_) => None,
            Self::Blocks(bytes) => Some(bytes.clone()),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Keys(keys) => keys.count,
            Self::Blocks(bytes) => bytes.len() / BLOCK_ID_BYTES,
        }
    }

    /// Bytes as a field of a request.
    fn field_bytes(&self) -> usize {
        match self {
            Self::Keys(keys) => keys.count + keys.bytes.len(),
            Self::Blocks(bytes) if bytes.is_empty() => 0,
            Self::Blocks(bytes) => 1 + encoded_len_varint(bytes.len() as u64) + bytes.len(),
        }
    }
}

/// Whether keys are what a request takes.
fn check<K: AsRef<[u8]>>(keys: &[K], limit: usize) -> Result<(), ClientError> {
    if keys.len() > limit {
        return Err(ClientError::TooManyBlocks { found: keys.len(), limit });
    }
    let lengths = keys.iter().map(|key| key.as_ref().len()).enumerate();
    match lengths.into_iter().find(|(_, found)| !(1..=KEY_BYTES_MAX).contains(found)) {
        Some((index, found)) => Err(ClientError::BadKey { index, found, limit: KEY_BYTES_MAX }),
        None => Ok(()),
    }
}

/// A look-up or a lease, whose blocks are named apart, as a `LaneRequest`. Its fields come before them.
pub(crate) fn encode(id: u64, op: &Op, named: &Named) -> Option<Vec<u8>> {
    const _: () = assert!(KEY_BYTES_MAX < 128, "the length of a key is one byte");
    let (tag, tags, bare) = match op {
        Op::Exists(request) => (EXISTS, (EXISTS_KEYS, EXISTS_IDS), request.encoded_len()),
        Op::Lease(request) => (LEASE, (LEASE_KEYS, LEASE_IDS), request.encoded_len()),
        _ => return None,
    };
    let length = (bare + named.field_bytes()) as u64;
    let head = 2 + encoded_len_varint(id) + encoded_len_varint(length);
    let mut message = Vec::with_capacity(head + bare + named.field_bytes());
    message.put_u8(ID);
    encode_varint(id, &mut message);
    message.put_u8(tag);
    encode_varint(length, &mut message);
    match op {
        Op::Exists(request) => request.encode(&mut message).ok()?,
        Op::Lease(request) => request.encode(&mut message).ok()?,
        _ => return None,
    }
    match named {
        Named::Keys(keys) => {
            let mut rest = &keys.bytes[..];
            while let Some(length) = rest.first() {
                let (key, after) = rest.split_at(1 + usize::from(*length));
                message.put_u8(tags.0);
                message.extend_from_slice(key);
                rest = after;
            }
        }
        Named::Blocks(bytes) if bytes.is_empty() => {}
        Named::Blocks(bytes) => {
            message.put_u8(tags.1);
            encode_varint(bytes.len() as u64, &mut message);
            message.extend_from_slice(bytes);
        }
    }
    Some(message)
}

/// An answer or a notice. The blocks of a lease are apart.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) response: LaneResponse,
    pub(crate) grants: Grants,
}

impl LaneMessage for Answered {
    fn decode_frame(frame: Bytes) -> Result<Self, DecodeError> {
        if let Some(answered) = quick(&frame) {
            return Ok(answered);
        }
        let mut response = LaneResponse::decode(frame)?;
        let grants = Grants::of(&mut response);
        Ok(Self { response, grants })
    }

    fn descriptors(&self) -> usize {
        self.response.descriptors()
    }
}

/// The answer to a lease that is not packed; `None` for anything else or unusual.
fn quick(frame: &[u8]) -> Option<Answered> {
    let mut rest = Rest(frame);
    let id = if *frame.first()? == ID {
        rest.byte()?;
        rest.number()?
    } else {
        0
    };
    // Nothing may follow: a second one would be merged with the first.
    if rest.byte()? != LEASE || rest.number()? != rest.0.len() as u64 {
        return None;
    }
    let mut leased = v1::LeaseResponse::default();
    let mut grants = Vec::new();
    while !rest.0.is_empty() {
        match rest.byte()? {
            0x08 => leased.lease = rest.number()?,
            0x10 => leased.ttl_ms = rest.number()?,
            GRANTS => {
                let length = usize::try_from(rest.number()?).ok()?;
                let (one, after) = rest.0.split_at_checked(length)?;
                if grants.is_empty() {
                    grants.reserve(rest.0.len() / 64);
                }
                grants.push(grant(Rest(one))?);
                rest = Rest(after);
            }
            0x20 => leased.generation = rest.number()?,
            _ => return None,
        }
    }
    let response = LaneResponse { id, result: Some(Answer::Lease(leased)) };
    Some(Answered { response, grants: Grants::Each(grants) })
}

fn grant(mut rest: Rest<'_>) -> Option<Grant> {
    let mut grant = Grant::EMPTY;
    while !rest.0.is_empty() {
        match rest.byte()? {
            0x08 => grant.outcome = GrantOutcome::try_from(i32::try_from(rest.number()?).ok()?).ok()?,
            0x10 => grant.reason = MissReason::try_from(i32::try_from(rest.number()?).ok()?).ok()?,
            0x18 => grant.chunk = rest.number()?,
            0x20 => grant.frame = u32::try_from(rest.number()?).ok()?,
            0x28 => grant.offset = rest.number()?,
            0x30 => grant.fence = rest.number()?,
            0x38 => grant.length = rest.number()?,
            0x40 => grant.checksum = rest.number()?,
            0x4A => {
                let (length, after) = rest.0.split_first()?;
                let (block, after) = after.split_first_chunk::<16>().filter(|_| *length == 16)?;
                grant.block = Some(BlockId::from_bytes(*block));
                rest = Rest(after);
            }
            // The tier and the device: the chunk says what it is when it is mapped.
            0x50 | 0x58 => {
                rest.number()?;
            }
            _ => return None,
        }
    }
    Some(grant)
}

/// What is left of a message.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, after) = self.0.split_first()?;
        self.0 = after;
        Some(*byte)
    }

    fn number(&mut self) -> Option<u64> {
        varint(|| self.byte())
    }
}

#[cfg(test)]
mod tests {
    use terrace_proto::v1::{BlockGrant, LaneRequest};

    use super::*;

    // A key in another's place would lease another block: what is encoded here is read by the generated code.
    #[test]
    fn keys_arrive_as_they_were_given() {
        let given: Vec<Vec<u8>> = (1..=64u8).map(|length| vec![length; usize::from(length)]).collect();
        let wanted: Vec<Bytes> = given.iter().cloned().map(Bytes::from).collect();
        let keys = Keys::of(&given, 64).unwrap();
        assert_eq!(keys.to_wire(), wanted);
        let named = Named::Keys(keys);
        let lease =
            v1::LeaseRequest { request_id: 9, space: 1, kind: 1, ttl_ms: 70_000, ..Default::default() };
        let exists = v1::ExistsRequest { spaces: vec![1, 400], mode: 1, ..Default::default() };
        for (bare, whole) in [
            (Op::Lease(lease.clone()), Op::Lease(v1::LeaseRequest { keys: wanted.clone(), ..lease.clone() })),
            (
                Op::Exists(exists.clone()),
                Op::Exists(v1::ExistsRequest { keys: wanted.clone(), ..exists.clone() }),
            ),
        ] {
            let message = encode(1 << 33, &bare, &named).unwrap();
            let read = LaneRequest::decode(&message[..]).unwrap();
            assert_eq!(read, LaneRequest { id: 1 << 33, op: Some(whole) });
        }
        assert!(encode(1, &Op::Release(v1::ReleaseRequest::default()), &named).is_none());
        for count in [0, 1, 8, 128] {
            let block_ids: Bytes = (0..=255).cycle().take(16 * count).collect();
            let named = Named::Blocks(block_ids.clone());
            assert_eq!(named.len(), count);
            for (bare, whole) in [
                (
                    Op::Lease(lease.clone()),
                    Op::Lease(v1::LeaseRequest { block_ids: block_ids.clone(), ..lease.clone() }),
                ),
                (
                    Op::Exists(exists.clone()),
                    Op::Exists(v1::ExistsRequest { block_ids: block_ids.clone(), ..exists.clone() }),
                ),
            ] {
                let message = encode(7, &bare, &named).unwrap();
                let read = LaneRequest::decode(&message[..]).unwrap();
                assert_eq!(read, LaneRequest { id: 7, op: Some(whole) });
            }
        }
    }

    // Keys at the edges of what is allowed, and too many of them.
    #[test]
    fn keys_are_checked_before_they_are_sent() {
        assert_eq!(Keys::of(&[vec![1u8; 1], vec![2; 64]], 2).unwrap().count, 2);
        assert!(matches!(Keys::of(&[b""], 2), Err(ClientError::BadKey { index: 0, found: 0, .. })));
        assert!(matches!(Keys::of(&[[0u8; 65]], 2), Err(ClientError::BadKey { found: 65, .. })));
        assert!(matches!(Keys::of(&[[0u8; 300]], 2), Err(ClientError::BadKey { found: 300, .. })));
        assert!(matches!(Keys::of(&[b"k"; 3], 2), Err(ClientError::TooManyBlocks { found: 3, limit: 2 })));
    }

    fn answers() -> Vec<LaneResponse> {
        let grant = |number: u64| BlockGrant {
            outcome: GrantOutcome::Granted.into(),
            reason: MissReason::Filling.into(),
            chunk: number,
            frame: u32::try_from(number & 0xFFFF).unwrap(),
            offset: number,
            fence: number,
            length: number,
            checksum: u64::MAX - number,
            block_id: vec![7; 16].into(),
            tier: 1,
            device: 3,
        };
        let blocks = (0..64).map(|bit| grant(1 << bit)).chain([BlockGrant::default()]).collect();
        let leased = v1::LeaseResponse {
            lease: u64::MAX,
            ttl_ms: 10_000,
            blocks,
            generation: 4,
            ..Default::default()
        };
        let odd = BlockGrant { block_id: vec![1; 15].into(), ..grant(5) };
        let few =
            v1::LeaseResponse { lease: 3, ttl_ms: 1, blocks: vec![grant(300), odd], ..Default::default() };
        let results = [
            Answer::Lease(leased),
            Answer::Lease(few),
            Answer::Lease(v1::LeaseResponse::default()),
            Answer::Release(v1::ReleaseResponse { released: 1 }),
        ];
        (0..).zip(results).map(|(id, result)| LaneResponse { id, result: Some(result) }).collect()
    }

    /// What the generated code makes of a frame.
    fn generated(frame: &[u8]) -> Option<(LaneResponse, Grants)> {
        let mut response = LaneResponse::decode(frame).ok()?;
        let grants = Grants::of(&mut response);
        Some((response, grants))
    }

    // A field in another's place would be another block's frame. And a daemon may send anything: every byte of good answers
    // in turn is made every other, and answers are cut short or doubled. The generated code must say the same.
    #[test]
    fn an_answer_is_what_the_generated_code_says() {
        let agree = |bytes: Vec<u8>| {
            let ours = Answered::decode_frame(bytes.clone().into()).ok();
            assert_eq!(ours.map(|ours| (ours.response, ours.grants)), generated(&bytes), "{bytes:?}");
        };
        for (number, mut answer) in answers().into_iter().enumerate() {
            let good = answer.encode_to_vec();
            assert_eq!(quick(&good).is_some(), number == 0 || number == 2, "{number}");
            agree(good);
            if let Some(Answer::Lease(leased)) = &mut answer.result {
                leased.blocks.truncate(2);
            }
            let good = answer.encode_to_vec();
            for at in 0..good.len() {
                agree(good[..at].to_vec());
                for byte in 0..=u8::MAX {
                    let mut bad = good.clone();
                    bad[at] = byte;
                    agree(bad);
                }
            }
            agree([good.clone(), good].concat());
        }
    }
}
