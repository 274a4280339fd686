//! The one answer that has hundreds of parts, encoded from what the core granted.
//!
//! By way of the generated messages each part would be built, measured twice and encoded: more work than to find and
//! pin the blocks. The bytes are those of the generated code.

use terrace_core::{Checksum, Grant, LeaseId, Micros};
use terrace_lane::{PACKED_GRANT_BYTES, PackedGrant};
use terrace_proto::v1;

use crate::convert;

/// Field numbers and wire types of `LaneResponse`, `LeaseResponse` and `BlockGrant`, as tags.
const ID: u8 = varint(1);
const LEASE: u8 = length(6);
const LEASE_ID: u8 = varint(1);
const LEASE_TTL: u8 = varint(2);
const LEASE_BLOCKS: u8 = length(3);
const LEASE_GENERATION: u8 = varint(4);
const OUTCOME: u8 = varint(1);
const REASON: u8 = varint(2);
const CHUNK: u8 = varint(3);
const FRAME: u8 = varint(4);
const OFFSET: u8 = varint(5);
const FENCE: u8 = varint(6);
const LENGTH: u8 = varint(7);
const CHECKSUM: u8 = varint(8);
const BLOCK_ID: u8 = length(9);
const TIER: u8 = varint(10);
const DEVICE: u8 = varint(11);

/// Outcome and reason of 1 byte, five numbers of 64 bits, two of 32, an id, a tier of 1 byte, and their tags: less than
/// 128, so that its length is one byte.
const GRANT_BYTES_MAX: usize = 2 * 2 + 5 * 11 + 2 * 6 + 18 + 2;
const _: () = assert!(GRANT_BYTES_MAX < 128);

const fn varint(field: u8) -> u8 {
    field << 3
}

const fn length(field: u8) -> u8 {
    field << 3 | 2
}

/// What became of a lease.
pub(crate) struct Leased<'a> {
    pub(crate) lease: Option<LeaseId>,
    pub(crate) ttl: Micros,
    pub(crate) generation: u64,
    pub(crate) grants: &'a [Grant],
}

/// A `LaneResponse` that answers request `id`.
pub(crate) fn leased(id: u64, leased: &Leased<'_>) -> Vec<u8> {
    let mut body = Vec::with_capacity(leased.grants.len() * (2 + GRANT_BYTES_MAX) + 40);
    let mut fields = Fields::default();
    fields.number(LEASE_ID, leased.lease.map_or(0, LeaseId::get));
    fields.number(LEASE_TTL, leased.ttl.millis());
    body.extend_from_slice(fields.bytes());
    for one in leased.grants {
        let mut fields = Fields::default();
        grant(&mut fields, one);
        let length = u8::try_from(fields.length).expect("a grant takes less than 128 bytes");
        body.extend_from_slice(&[LEASE_BLOCKS, length]);
        body.extend_from_slice(fields.bytes());
    }
    let mut fields = Fields::default();
    fields.number(LEASE_GENERATION, leased.generation);
    body.extend_from_slice(fields.bytes());
    let mut head = Fields::default();
    head.number(ID, id);
    head.push(&[LEASE]);
    head.value(body.len() as u64);
    let mut message = Vec::with_capacity(head.length + body.len());
    message.extend_from_slice(head.bytes());
    message.extend_from_slice(&body);
    message
}

/// The answer to whoever reads packed grants; `None` if these cannot be packed.
pub(crate) fn packed(leased: &Leased<'_>) -> Option<v1::LeaseResponse> {
    let mut bytes = Vec::with_capacity(leased.grants.len() * PACKED_GRANT_BYTES);
    let mut packed_length = None;
    for grant in leased.grants {
        let (outcome, reason) = convert::outcome(grant);
        let (outcome, reason) = (u8::try_from(outcome as i32).ok()?, u8::try_from(reason as i32).ok()?);
        let one = match grant {
            Grant::Granted { block, frame, fence, offset, length, checksum, memory } => {
                if *packed_length.get_or_insert(length.get()) != length.get() {
                    return None;
                }
                let (tier, device) = convert::memory(*memory);
                PackedGrant {
                    block: block.to_bytes(),
                    chunk: frame.chunk.get(),
                    offset: *offset,
                    fence: fence.get(),
                    checksum: checksum.map_or(0, Checksum::get),
                    frame: frame.index,
                    outcome,
                    reason,
                    tier: u8::try_from(tier as i32).ok()?,
                    device: u8::try_from(device).ok()?,
                }
            }
            Grant::Promoting | Grant::Missing(_) | Grant::Throttled | Grant::Exists => {
                PackedGrant { outcome, reason, ..PackedGrant::default() }
            }
        };
        bytes.extend_from_slice(&one.to_bytes());
    }
    Some(v1::LeaseResponse {
        lease: leased.lease.map_or(0, LeaseId::get),
        ttl_ms: leased.ttl.millis(),
        blocks: Vec::new(),
        generation: leased.generation,
        packed: bytes.into(),
        packed_length: packed_length.unwrap_or(0),
    })
}

fn grant(fields: &mut Fields, grant: &Grant) {
    let (outcome, reason) = convert::outcome(grant);
    fields.small(OUTCOME, outcome as i32);
    fields.small(REASON, reason as i32);
    match grant {
        Grant::Granted { block, frame, fence, offset, length, checksum, memory } => {
            fields.number(CHUNK, frame.chunk.get());
            fields.number(FRAME, frame.index.into());
            fields.number(OFFSET, *offset);
            fields.number(FENCE, fence.get());
            fields.number(LENGTH, length.get());
            fields.number(CHECKSUM, checksum.map_or(0, Checksum::get));
            fields.push(&[BLOCK_ID, 16]);
            fields.push(&block.to_bytes());
            let (tier, device) = convert::memory(*memory);
            fields.small(TIER, tier as i32);
            fields.number(DEVICE, device.into());
        }
        Grant::Promoting | Grant::Missing(_) | Grant::Throttled | Grant::Exists => {}
    }
}

/// Fields of one grant, or of anything shorter.
struct Fields {
    room: [u8; GRANT_BYTES_MAX],
    length: usize,
}

impl Default for Fields {
    fn default() -> Self {
        Self { room: [0; GRANT_BYTES_MAX], length: 0 }
    }
}

impl Fields {
    fn bytes(&self) -> &[u8] {
        &self.room[..self.length]
    }

    fn push(&mut self, bytes: &[u8]) {
        self.room[self.length..][..bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }

    /// A value of an enum of ours, which are few.
    fn small(&mut self, tag: u8, value: i32) {
        self.number(tag, u64::try_from(value).expect("values of our enums are small and positive"));
    }

    /// A number; nothing if it is 0.
    fn number(&mut self, tag: u8, number: u64) {
        if number != 0 {
            self.push(&[tag]);
            self.value(number);
        }
    }

    fn value(&mut self, mut value: u64) {
        while value >= 0x80 {
            let [low, ..] = value.to_le_bytes();
            self.push(&[low | 0x80]);
            value >>= 7;
        }
        let [low, ..] = value.to_le_bytes();
        self.push(&[low]);
    }
}

/// Where the fields are, that a change of the messages does not compile without a look at this file.
const _: fn(v1::BlockGrant) = |grant| {
    let v1::BlockGrant {
        outcome: _,
        reason: _,
        chunk: _,
        frame: _,
        offset: _,
        fence: _,
        length: _,
        checksum: _,
        block_id: _,
        tier: _,
        device: _,
    } = grant;
};
const _: fn(v1::LeaseResponse) = |leased| {
    let v1::LeaseResponse { lease: _, ttl_ms: _, blocks: _, generation: _, packed: _, packed_length: _ } =
        leased;
};

#[cfg(test)]
mod tests {
    use prost::Message;

    use terrace_core::{BlockId, ByteCount, ChunkId, Fence, FrameRef, GpuId, Memory, MissReason};

    use super::*;

    fn granted(number: u64, memory: Memory) -> Grant {
        let frame =
            FrameRef { chunk: ChunkId::new(number >> 32), index: u32::try_from(number & 0xFFFF).unwrap() };
        Grant::Granted {
            block: BlockId::from_bytes([7; 16]),
            frame,
            fence: Fence::new(number),
            offset: number,
            length: ByteCount::new(number),
            checksum: (number % 2 == 1).then(|| Checksum::new(number)),
            memory,
        }
    }

    // A field in the wrong place would be another block's frame: every kind of grant, with numbers of every length, is
    // compared with what the generated code makes of the same answer.
    #[test]
    fn the_bytes_are_those_of_the_generated_code() {
        let mut grants: Vec<Grant> = (0..64).map(|bit| granted(1 << bit, Memory::Pinned)).collect();
        grants.extend((0..64).map(|bit| granted(u64::MAX >> bit, Memory::Hbm(GpuId::new(3)))));
        grants.extend([Grant::Promoting, Grant::Throttled, Grant::Exists]);
        grants.extend([MissReason::Unknown, MissReason::Filling, MissReason::Device].map(Grant::Missing));
        for (lease, count) in
            [(None, 0), (Some(LeaseId::new(1)), 1), (Some(LeaseId::new(u64::MAX)), grants.len())]
        {
            let grants = &grants[..count];
            let ttl = Micros::from_millis(10_000);
            let ours = leased(300, &Leased { lease, ttl, generation: 5, grants });
            let wire = v1::LeaseResponse {
                lease: lease.map_or(0, LeaseId::get),
                ttl_ms: 10_000,
                blocks: convert::grants(grants),
                generation: 5,
                ..Default::default()
            };
            let result = Some(v1::lane_response::Result::Lease(wire));
            assert_eq!(ours, v1::LaneResponse { id: 300, result }.encode_to_vec(), "{count} grants");
        }
    }
    // The same for packed ones, which are not for blocks of several lengths.
    #[test]
    fn packed_grants_are_those_of_the_generated_code() {
        let length = |mut grant: Grant| {
            if let Grant::Granted { length, .. } = &mut grant {
                *length = ByteCount::new(4096);
            }
            grant
        };
        let hbm = Memory::Hbm(GpuId::new(3));
        let mut grants: Vec<Grant> = (0..64).map(|bit| length(granted(1 << bit, Memory::Pinned))).collect();
        grants.extend((0..64).map(|bit| length(granted(u64::MAX >> bit, hbm))));
        grants.extend([Grant::Promoting, Grant::Throttled, Grant::Exists]);
        grants.extend([MissReason::Unknown, MissReason::Filling, MissReason::Device].map(Grant::Missing));
        let ttl = Micros::from_millis(10_000);
        let leased = Leased { lease: Some(LeaseId::new(9)), ttl, generation: 5, grants: &grants };
        let answer = packed(&leased).unwrap();
        assert_eq!((answer.lease, answer.ttl_ms, answer.generation), (9, 10_000, 5));
        assert_eq!((answer.blocks.len(), answer.packed_length), (0, 4096));
        let found = answer.packed.as_chunks().0.iter().map(PackedGrant::from_bytes).map(|grant| {
            let is_granted = i32::from(grant.outcome) == v1::GrantOutcome::Granted as i32;
            v1::BlockGrant {
                outcome: grant.outcome.into(),
                reason: grant.reason.into(),
                chunk: grant.chunk,
                frame: grant.frame,
                offset: grant.offset,
                fence: grant.fence,
                length: if is_granted { answer.packed_length } else { 0 },
                checksum: grant.checksum,
                block_id: if is_granted { grant.block.to_vec().into() } else { Default::default() },
                tier: grant.tier.into(),
                device: grant.device.into(),
            }
        });
        assert_eq!(found.collect::<Vec<_>>(), convert::grants(&grants));
        let lengths = [granted(1, Memory::Pinned), granted(2, Memory::Pinned)];
        assert_eq!(packed(&Leased { grants: &lengths, ..leased }), None);
    }
}
