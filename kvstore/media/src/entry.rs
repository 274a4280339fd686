//! Entries of the catalog: the bytes of keys and values.
//!
//! Every value begins with its version and ends with a CRC-64/NVMe of what is
//! before it. Layouts, little-endian:
//!
//! A block, version 2 (key: `b`, block id):
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 1 | version, 2 |
//! | 1 | 1 | flags: bit 0 set if there is a parent |
//! | 2 | 2 | device |
//! | 4 | 4 | slot |
//! | 8 | 4 | index |
//! | 12 | 4 | depth |
//! | 16 | 1 | turn |
//! | 17 | 1 | uses |
//! | 18 | 2 | zero |
//! | 20 | 4 | payload length |
//! | 24 | 8 | payload checksum |
//! | 32 | 8 | generation |
//! | 40 | 8 | write sequence |
//! | 48 | 16 | space id |
//! | 64 | 16 | tenant id |
//! | 80 | 16 | parent id, or zero |
//! | 96 | 8 | CRC over bytes 0 to 96 |
//!
//! Version 1 is read, and never written: it has no statistics of use. A later
//! minor format may put fields between the last one and the CRC; they are skipped.
//!
//! A slot (key: `c`, device u16, slot u32, big-endian so that slots are in order):
//! version 1, space id, `frame_bytes` u64, carve sequence u64, CRC.
//!
//! A space (key: `s`, space id): version 1, tenant id, generation u64, length of
//! the tenant's name u16, name, manifest, CRC.

use terrace_core::{
    BLOCK_BYTES_MAX, BlockHeader, BlockId, ByteCount, Checksum, DeviceId, DiskFrame, SpaceId, TenantId,
    UseStats,
};

use crate::api::{Carve, FoundHeader, SpaceRecord};
use crate::header::{MANIFEST_BYTES_MAX, TENANT_NAME_BYTES_MAX, crc, id_at, u16_at, u32_at, u64_at};

/// Kinds of entry: the first byte of a key.
pub(crate) const KEY_BLOCK: u8 = b'b';
pub(crate) const KEY_CARVE: u8 = b'c';
pub(crate) const KEY_META: u8 = b'm';
pub(crate) const KEY_SPACE: u8 = b's';

const CRC_BYTES: usize = 8;
const BLOCK_VERSION: u8 = 2;
/// Bytes of a block's value before its CRC.
const BLOCK_BODY: usize = 96;
const BLOCK_V1_VERSION: u8 = 1;
const BLOCK_V1_BODY: usize = 115;
const FLAG_PARENT: u8 = 1;
const CARVE_BODY: usize = 33;
const SPACE_FIXED: usize = 27;
// A length takes four bytes.
const _: () = assert!(BLOCK_BYTES_MAX <= u32::MAX as u64);

/// A key: its kind, then its name.
pub(crate) fn key(kind: u8, rest: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + rest.len());
    key.push(kind);
    key.extend_from_slice(rest);
    key
}

/// Big-endian, so that slots are walked in order.
pub(crate) fn carve_key(device: DeviceId, slot: u32) -> Vec<u8> {
    let mut rest = device.get().to_be_bytes().to_vec();
    rest.extend_from_slice(&slot.to_be_bytes());
    key(KEY_CARVE, &rest)
}

/// # Panics
/// If the length is beyond [`BLOCK_BYTES_MAX`], which no space allows.
pub(crate) fn encode_block(
    frame: DiskFrame,
    header: &BlockHeader,
    stats: UseStats,
) -> [u8; BLOCK_BODY + CRC_BYTES] {
    let length = u32::try_from(header.length.get()).expect("a block is at most BLOCK_BYTES_MAX long");
    let mut value = [0u8; BLOCK_BODY + CRC_BYTES];
    value[0] = BLOCK_VERSION;
    value[2..4].copy_from_slice(&frame.device.get().to_le_bytes());
    value[4..8].copy_from_slice(&frame.slot.to_le_bytes());
    value[8..12].copy_from_slice(&frame.index.to_le_bytes());
    value[12..16].copy_from_slice(&stats.depth.to_le_bytes());
    value[16] = stats.turn;
    value[17] = stats.uses;
    value[20..24].copy_from_slice(&length.to_le_bytes());
    value[24..32].copy_from_slice(&header.checksum.get().to_le_bytes());
    value[32..40].copy_from_slice(&header.generation.to_le_bytes());
    value[40..48].copy_from_slice(&header.write_sequence.to_le_bytes());
    value[48..64].copy_from_slice(&header.space.to_bytes());
    value[64..80].copy_from_slice(&header.tenant.to_bytes());
    if let Some(parent) = header.parent {
        value[1] = FLAG_PARENT;
        value[80..96].copy_from_slice(&parent.to_bytes());
    }
    let sum = crc(&value[..BLOCK_BODY]);
    value[BLOCK_BODY..].copy_from_slice(&sum.to_le_bytes());
    value
}

/// Any bytes may be given.
pub(crate) fn decode_block(block: BlockId, value: &[u8]) -> Option<FoundHeader> {
    let body = checked(value)?;
    match *body.first()? {
        BLOCK_VERSION if body.len() >= BLOCK_BODY => decode_block_v2(block, body),
        BLOCK_V1_VERSION if body.len() == BLOCK_V1_BODY => decode_block_v1(block, body),
        _ => None,
    }
}

fn decode_block_v2(block: BlockId, body: &[u8]) -> Option<FoundHeader> {
    let frame =
        DiskFrame { device: DeviceId::new(u16_at(body, 2)), slot: u32_at(body, 4), index: u32_at(body, 8) };
    let parent = match body[1] {
        0 => None,
        FLAG_PARENT => Some(BlockId::from_bytes(id_at(body, 80))),
        _ => return None,
    };
    let header = BlockHeader {
        block,
        space: SpaceId::from_bytes(id_at(body, 48)),
        tenant: TenantId::from_bytes(id_at(body, 64)),
        parent,
        length: length(u32_at(body, 20).into())?,
        checksum: Checksum::new(u64_at(body, 24)),
        generation: u64_at(body, 32),
        write_sequence: u64_at(body, 40),
    };
    let stats = UseStats { depth: u32_at(body, 12), turn: body[16], uses: body[17] };
    Some(FoundHeader { frame, header, stats })
}

fn decode_block_v1(block: BlockId, body: &[u8]) -> Option<FoundHeader> {
    let frame =
        DiskFrame { device: DeviceId::new(u16_at(body, 1)), slot: u32_at(body, 3), index: u32_at(body, 7) };
    let parent = match body[43] {
        0 => None,
        1 => Some(BlockId::from_bytes(id_at(body, 44))),
        _ => return None,
    };
    let header = BlockHeader {
        block,
        space: SpaceId::from_bytes(id_at(body, 11)),
        tenant: TenantId::from_bytes(id_at(body, 27)),
        parent,
        length: length(u64_at(body, 60))?,
        checksum: Checksum::new(u64_at(body, 68)),
        generation: u64_at(body, 76),
        write_sequence: u64_at(body, 84),
    };
    Some(FoundHeader { frame, header, stats: UseStats::default() })
}

/// A length that a block may have.
fn length(bytes: u64) -> Option<ByteCount> {
    (1..=BLOCK_BYTES_MAX).contains(&bytes).then(|| ByteCount::new(bytes))
}

pub(crate) fn encode_carve(carve: &Carve, sequence: u64) -> Vec<u8> {
    let mut value = Vec::with_capacity(CARVE_BODY + CRC_BYTES);
    value.push(1);
    value.extend_from_slice(&carve.space.to_bytes());
    value.extend_from_slice(&carve.frame_bytes.get().to_le_bytes());
    value.extend_from_slice(&sequence.to_le_bytes());
    sealed(value)
}

/// Any bytes may be given. `key` is what follows the kind.
pub(crate) fn decode_carve(key: &[u8], value: &[u8]) -> Option<(Carve, u64)> {
    let body = checked(value)?;
    if body.len() < CARVE_BODY || body[0] != 1 {
        return None;
    }
    let (device, slot) = key.split_at_checked(2)?;
    let carve = Carve {
        device: DeviceId::new(u16::from_be_bytes(device.try_into().ok()?)),
        slot: u32::from_be_bytes(slot.try_into().ok()?),
        space: SpaceId::from_bytes(id_at(body, 1)),
        frame_bytes: ByteCount::new(u64_at(body, 17)),
    };
    (carve.frame_bytes.get() > 0).then(|| (carve, u64_at(body, 25)))
}

/// The lengths were checked by [`crate::catalog::check_record`].
pub(crate) fn encode_space(record: &SpaceRecord) -> Vec<u8> {
    let name = u16::try_from(record.tenant_name.len()).expect("check_record allows 256");
    let mut value = vec![1];
    value.extend_from_slice(&record.tenant.to_bytes());
    value.extend_from_slice(&record.generation.to_le_bytes());
    value.extend_from_slice(&name.to_le_bytes());
    value.extend_from_slice(record.tenant_name.as_bytes());
    value.extend_from_slice(&record.manifest);
    sealed(value)
}

/// Any bytes may be given.
pub(crate) fn decode_space(space: SpaceId, value: &[u8]) -> Option<SpaceRecord> {
    let body = checked(value)?;
    if body.len() < SPACE_FIXED || body[0] != 1 {
        return None;
    }
    let (name, manifest) = body[SPACE_FIXED..].split_at_checked(usize::from(u16_at(body, 25)))?;
    if name.len() > TENANT_NAME_BYTES_MAX || manifest.len() > MANIFEST_BYTES_MAX {
        return None;
    }
    Some(SpaceRecord {
        space,
        tenant: TenantId::from_bytes(id_at(body, 1)),
        generation: u64_at(body, 17),
        tenant_name: std::str::from_utf8(name).ok()?.to_owned(),
        manifest: manifest.to_vec(),
    })
}

/// The value with its CRC.
fn sealed(mut value: Vec<u8>) -> Vec<u8> {
    let sum = crc(&value);
    value.extend_from_slice(&sum.to_le_bytes());
    value
}

/// What is before a CRC that matches.
fn checked(value: &[u8]) -> Option<&[u8]> {
    let (body, sum) = value.split_at_checked(value.len().checked_sub(CRC_BYTES)?)?;
    (u64_at(sum, 0) == crc(body)).then_some(body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::golden::golden;

    fn header() -> BlockHeader {
        BlockHeader {
            block: BlockId::from_bytes([1; 16]),
            space: SpaceId::from_bytes([2; 16]),
            tenant: TenantId::from_bytes([3; 16]),
            parent: Some(BlockId::from_bytes([4; 16])),
            length: ByteCount::new(368_640),
            checksum: Checksum::new(5),
            generation: 6,
            write_sequence: 7,
        }
    }

    fn record() -> SpaceRecord {
        SpaceRecord {
            space: SpaceId::from_bytes([2; 16]),
            tenant: TenantId::from_bytes([3; 16]),
            tenant_name: "default".to_owned(),
            generation: 6,
            manifest: vec![9; 30],
        }
    }

    /// A block's value as the first format had it. Nothing writes it any more.
    fn first_format(frame: DiskFrame, header: &BlockHeader) -> Vec<u8> {
        let mut value = vec![BLOCK_V1_VERSION];
        value.extend_from_slice(&frame.device.get().to_le_bytes());
        value.extend_from_slice(&frame.slot.to_le_bytes());
        value.extend_from_slice(&frame.index.to_le_bytes());
        value.extend_from_slice(&header.space.to_bytes());
        value.extend_from_slice(&header.tenant.to_bytes());
        value.push(1);
        value.extend_from_slice(&header.parent.unwrap().to_bytes());
        value.extend_from_slice(&header.length.get().to_le_bytes());
        value.extend_from_slice(&header.checksum.get().to_le_bytes());
        value.extend_from_slice(&header.generation.to_le_bytes());
        value.extend_from_slice(&header.write_sequence.to_le_bytes());
        value.extend_from_slice(&[0; 23]);
        sealed(value)
    }

    /// Values of this and of the first format must be read for ever, and this one's written as it was.
    #[test]
    fn golden_values() {
        let frame = DiskFrame { device: DeviceId::new(1), slot: 2, index: 3 };
        let stats = UseStats { depth: 0x0102_0304, turn: 5, uses: 6 };
        let value = encode_block(frame, &header(), stats);
        let golden_block = golden("block-2.bin", &value);
        assert_eq!(golden_block, value);
        assert_eq!(
            decode_block(header().block, &golden_block),
            Some(FoundHeader { frame, header: header(), stats })
        );
        let old = golden("block-1.bin", &first_format(frame, &header()));
        let found = FoundHeader { frame, header: header(), stats: UseStats::default() };
        assert_eq!(decode_block(header().block, &old), Some(found));
        let frame_bytes = ByteCount::new(372_736);
        let carve = Carve { device: frame.device, slot: 2, space: header().space, frame_bytes };
        let slot = golden("carve-1.bin", &encode_carve(&carve, 9));
        assert_eq!(slot, encode_carve(&carve, 9));
        assert_eq!(decode_carve(&carve_key(carve.device, 2)[1..], &slot), Some((carve, 9)));
        let space = golden("space-1.bin", &encode_space(&record()));
        assert_eq!(space, encode_space(&record()));
        assert_eq!(decode_space(record().space, &space), Some(record()));
    }

    /// A minor version to come may append fields: they must be skipped, or the first start after a
    /// downgrade would take the whole catalog for damaged.
    #[test]
    fn fields_of_a_later_minor_are_skipped() {
        let frame = DiskFrame { device: DeviceId::new(1), slot: 2, index: 3 };
        let stats = UseStats { depth: 4, turn: 5, uses: 6 };
        let mut value = encode_block(frame, &header(), stats)[..BLOCK_BODY].to_vec();
        value.extend_from_slice(b"later");
        let found = decode_block(header().block, &sealed(value));
        assert_eq!(found, Some(FoundHeader { frame, header: header(), stats }));
    }

    /// A version that we do not know must not be read as one that we do.
    #[test]
    fn other_versions_are_no_blocks() {
        let frame = DiskFrame { device: DeviceId::new(1), slot: 2, index: 3 };
        for version in [0, 1, 3, 255] {
            let mut value = encode_block(frame, &header(), UseStats::default())[..BLOCK_BODY].to_vec();
            value[0] = version;
            assert_eq!(decode_block(header().block, &sealed(value)), None, "version {version}");
        }
    }

    proptest! {
        /// Every block must come back as it was written, statistics included.
        #[test]
        fn blocks_round_trip(
            device: u16, slot: u32, index: u32, parent: Option<[u8; 16]>, length in 1..=BLOCK_BYTES_MAX,
            sum: u64, generation: u64, write_sequence: u64, depth: u32, turn: u8, uses: u8,
        ) {
            let frame = DiskFrame { device: DeviceId::new(device), slot, index };
            let header = BlockHeader {
                parent: parent.map(BlockId::from_bytes),
                length: ByteCount::new(length),
                checksum: Checksum::new(sum),
                generation,
                write_sequence,
                ..header()
            };
            let stats = UseStats { depth, turn, uses };
            let value = encode_block(frame, &header, stats);
            prop_assert_eq!(decode_block(header.block, &value), Some(FoundHeader { frame, header, stats }));
        }

        /// One flipped bit anywhere in a value must be noticed.
        #[test]
        fn a_flipped_bit_is_noticed(at in 0..(BLOCK_BODY + CRC_BYTES) * 8) {
            let frame = DiskFrame { device: DeviceId::new(1), slot: 2, index: 3 };
            let mut value = encode_block(frame, &header(), UseStats::default());
            value[at / 8] ^= 1 << (at % 8);
            prop_assert_eq!(decode_block(header().block, &value), None);
            let carve = Carve { device: frame.device, slot: 2, space: header().space, frame_bytes: ByteCount::new(8192) };
            let mut value = encode_carve(&carve, 1);
            let place = at % (value.len() * 8);
            value[place / 8] ^= 1 << (place % 8);
            prop_assert_eq!(decode_carve(&carve_key(carve.device, 2)[1..], &value), None);
            let mut value = encode_space(&record());
            let place = at % (value.len() * 8);
            value[place / 8] ^= 1 << (place % 8);
            prop_assert_eq!(decode_space(record().space, &value), None);
        }

        /// Whatever lies in the catalog, decoding must not panic, even where the checksum is right;
        /// and it must not take more memory than the value.
        #[test]
        fn random_bytes_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..4000), key in proptest::collection::vec(any::<u8>(), 0..9),
            version in 0u8..4, forge: bool,
        ) {
            let value = if forge {
                let mut value = bytes.clone();
                if let Some(first) = value.first_mut() {
                    *first = version;
                }
                sealed(value)
            } else {
                bytes
            };
            let _ = decode_block(header().block, &value);
            let _ = decode_carve(&key, &value);
            if let Some(record) = decode_space(record().space, &value) {
                prop_assert!(record.manifest.len() + record.tenant_name.len() <= value.len());
            }
        }
    }
}
