//! Requests as they come off the lane.
//!
//! Two of them name hundreds of keys. The generated code makes each key an object that shares its memory by a count, which
//! costs more than to look the block up; here the keys of those two stay where they arrived. Whatever is not exactly as
//! our own client encodes it is left to the generated code, and with it all that is wrong.

use std::ops::Range;

use bytes::Bytes;
use prost::{DecodeError, Message};

use terrace_lane::{LaneMessage, varint};
use terrace_proto::v1::{self, LaneRequest, lane_request::Op};
use terrace_proto::{BLOCKS_PER_REQUEST_MAX, KEY_BYTES_MAX};

/// Tags of `LaneRequest`: the number of a field and what follows it.
const ID: u8 = 1 << 3;
const EXISTS: u8 = 4 << 3 | 2;
const LEASE: u8 = 6 << 3 | 2;

/// A request. Of those that have keys, they may be apart.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) request: LaneRequest,
    pub(super) keys: Option<Keys>,
}

/// The keys of a request, in the message that they came in.
#[derive(Debug)]
pub(super) struct Keys {
    message: Bytes,
    places: Vec<Range<u32>>,
}

impl Keys {
    /// In order.
    pub(super) fn list(&self) -> Vec<&[u8]> {
        self.places.iter().map(|place| &self.message[place.start as usize..place.end as usize]).collect()
    }
}

impl LaneMessage for Asked {
    fn decode_frame(frame: Bytes) -> Result<Self, DecodeError> {
        match quick(&frame) {
            Some((request, places)) => Ok(Self { request, keys: Some(Keys { message: frame, places }) }),
            None => Ok(Self { request: LaneRequest::decode(frame)?, keys: None }),
        }
    }

    fn descriptors(&self) -> usize {
        self.request.descriptors()
    }
}

/// A lease or a look-up without its keys, and where those are; `None` for anything else or unusual.
fn quick(frame: &[u8]) -> Option<(LaneRequest, Vec<Range<u32>>)> {
    let mut rest = Rest { frame, at: 0, end: frame.len() };
    let id = if rest.next_is(ID)? { rest.number()? } else { 0 };
    let kind = rest.byte()?;
    let length = rest.length()?;
    // Nothing may follow: a second one would be merged with the first.
    if rest.at + length != frame.len() {
        return None;
    }
    let (op, places) = match kind {
        EXISTS => exists(rest)?,
        LEASE => lease(rest)?,
        _ => return None,
    };
    Some((LaneRequest { id, op: Some(op) }, places))
}

fn exists(mut rest: Rest<'_>) -> Option<(Op, Vec<Range<u32>>)> {
    let mut request = v1::ExistsRequest::default();
    let mut places = Vec::new();
    while let Some(tag) = rest.tag()? {
        match tag {
            // Packed.
            0x0A => {
                let end = rest.length()?.checked_add(rest.at)?;
                while rest.at < end {
                    request.spaces.push(rest.small()?);
                }
                if rest.at != end {
                    return None;
                }
            }
            0x12 => places.push(rest.key(&places)?),
            0x18 => request.mode = rest.choice()?,
            _ => return None,
        }
    }
    Some((Op::Exists(request), places))
}

fn lease(mut rest: Rest<'_>) -> Option<(Op, Vec<Range<u32>>)> {
    let mut request = v1::LeaseRequest::default();
    let mut places = Vec::new();
    while let Some(tag) = rest.tag()? {
        match tag {
            0x08 => request.request_id = rest.number()?,
            0x10 => request.space = rest.small()?,
            0x18 => request.kind = rest.choice()?,
            0x22 => places.push(rest.key(&places)?),
            0x2A => {
                let length = rest.length()?;
                let bytes = rest.frame.get(rest.at..rest.at + length)?;
                request.parent_key = Bytes::copy_from_slice(bytes);
                rest.at += length;
            }
            0x30 => request.ttl_ms = rest.number()?,
            0x38 => request.want_tier = rest.choice()?,
            0x40 => request.wait_ms = rest.number()?,
            0x48 => request.purpose = rest.choice()?,
            0x50 => request.want_device = rest.small()?,
            0x68 => request.processor = rest.small()?,
            0x70 => request.packed = rest.number()? != 0,
            _ => return None,
        }
    }
    Some((Op::Lease(request), places))
}

/// What is left of a message.
struct Rest<'a> {
    frame: &'a [u8],
    at: usize,
    end: usize,
}

impl Rest<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.frame.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// Whether this tag is next; it is taken then.
    fn next_is(&mut self, tag: u8) -> Option<bool> {
        let is = *self.frame.get(self.at)? == tag;
        self.at += usize::from(is);
        Some(is)
    }

    /// The next tag of one byte; `Some(None)` at the end.
    fn tag(&mut self) -> Option<Option<u8>> {
        if self.at == self.end { Some(None) } else { self.byte().map(Some) }
    }

    fn number(&mut self) -> Option<u64> {
        varint(|| self.byte())
    }

    fn small(&mut self) -> Option<u32> {
        u32::try_from(self.number()?).ok()
    }

    /// A value of an enum.
    fn choice(&mut self) -> Option<i32> {
        i32::try_from(self.number()?).ok()
    }

    /// A length that does not lead out of the message.
    fn length(&mut self) -> Option<usize> {
        let length = usize::try_from(self.number()?).ok()?;
        (length <= self.end - self.at.min(self.end)).then_some(length)
    }

    /// Where the next key is, after these.
    fn key(&mut self, before: &[Range<u32>]) -> Option<Range<u32>> {
        let length = self.length()?;
        if length > KEY_BYTES_MAX || before.len() >= BLOCKS_PER_REQUEST_MAX {
            return None;
        }
        let start = u32::try_from(self.at).ok()?;
        self.at += length;
        Some(start..u32::try_from(self.at).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The request with its keys in their place.
    fn whole(asked: Asked) -> LaneRequest {
        let Asked { mut request, keys } = asked;
        if let Some(keys) = keys {
            let list = keys.list().into_iter().map(Bytes::copy_from_slice).collect();
            match &mut request.op {
                Some(Op::Lease(lease)) => lease.keys = list,
                Some(Op::Exists(exists)) => exists.keys = list,
                other => panic!("keys of {other:?}"),
            }
        }
        request
    }

    fn requests() -> Vec<LaneRequest> {
        let keys = |count: usize| -> Vec<Bytes> { (0..count).map(|at| vec![7; at % 65].into()).collect() };
        let lease = v1::LeaseRequest {
            request_id: 1 << 62,
            space: u32::MAX,
            kind: 1,
            keys: keys(200),
            parent_key: vec![1; 64].into(),
            ttl_ms: 10_000,
            want_tier: 2,
            wait_ms: 300,
            purpose: 1,
            want_device: 5,
            packed: true,
            processor: 3,
            ..Default::default()
        };
        let exists = v1::ExistsRequest {
            spaces: vec![1, 300, u32::MAX],
            keys: keys(130),
            mode: 2,
            ..Default::default()
        };
        let bare = v1::LeaseRequest { keys: keys(3), ..Default::default() };
        let ops = [
            Op::Lease(lease),
            Op::Exists(exists),
            Op::Lease(bare),
            Op::Lease(v1::LeaseRequest::default()),
            Op::Release(v1::ReleaseRequest { request_id: 4, leases: vec![1, 2] }),
        ];
        let ids = [1, 1 << 40, 0, 127, 5];
        ops.into_iter().zip(ids).map(|(op, id)| LaneRequest { id, op: Some(op) }).collect()
    }

    // A key or a field in another's place would lease another block: what is read here is compared with what the
    // generated code reads.
    #[test]
    fn a_request_is_what_the_generated_code_says() {
        for request in requests() {
            let frame = Bytes::from(request.encode_to_vec());
            let apart = quick(&frame).is_some();
            let keyed = matches!(request.op, Some(Op::Lease(_) | Op::Exists(_)));
            assert_eq!(apart, keyed, "{request:?}");
            assert_eq!(whole(Asked::decode_frame(frame).unwrap()), request);
        }
    }

    // Anybody may send anything: every byte of good requests in turn is made every other, and messages are cut short
    // or doubled. The generated code must say the same, and nothing may panic.
    #[test]
    fn what_is_damaged_is_read_as_the_generated_code_reads_it() {
        let agree = |bytes: Vec<u8>| {
            let frame = Bytes::from(bytes);
            match (Asked::decode_frame(frame.clone()), LaneRequest::decode(frame)) {
                (Ok(ours), Ok(theirs)) => assert_eq!(whole(ours), theirs),
                (Err(_), Err(_)) => {}
                (ours, theirs) => panic!("{ours:?} where the generated code says {theirs:?}"),
            }
        };
        for mut request in requests() {
            if let Some(
                Op::Lease(v1::LeaseRequest { keys, .. }) | Op::Exists(v1::ExistsRequest { keys, .. }),
            ) = &mut request.op
            {
                keys.truncate(4);
            }
            let good = request.encode_to_vec();
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
