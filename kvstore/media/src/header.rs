//! Header pages: the first 4 KiB of each frame and of each slot on a device.
//!
//! Layout of a frame header, little-endian; bytes not named are zero and are
//! covered by the CRC:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `TERRFRM1` |
//! | 8 | 2 | format version, 1 |
//! | 10 | 2 | flags: bit 0 set if there is a parent |
//! | 12 | 4 | zero |
//! | 16 | 16 | block id |
//! | 32 | 16 | space id |
//! | 48 | 16 | tenant id |
//! | 64 | 16 | parent id, or zero |
//! | 80 | 8 | payload length in bytes |
//! | 88 | 8 | payload checksum (CRC-64/NVMe, seeded) |
//! | 96 | 8 | generation of the space |
//! | 104 | 8 | write sequence |
//! | 112 | 8 | CRC-64/NVMe over bytes 0 to 112 |
//!
//! The CRC comes last so that it covers one contiguous range. A slot header is
//! documented at [`SlotHeader`].

use terrace_core::{BLOCK_BYTES_MAX, BlockHeader, BlockId, ByteCount, Checksum, SpaceId, TenantId};

use crate::api::SpaceRecord;

const PAGE: usize = 4096;
const FRAME_MAGIC: &[u8; 8] = b"TERRFRM1";
const SLOT_MAGIC: &[u8; 8] = b"TERRSLT1";
const VERSION: u16 = 1;
const FLAG_PARENT: u16 = 1;
const FRAME_CRC_AT: usize = 112;
/// Bytes of a frame header; the rest of its page is zero.
pub(crate) const FRAME_HEADER_BYTES: usize = FRAME_CRC_AT + 8;
const SLOT_FIXED: usize = 96;
/// Longest manifest that is kept.
pub const MANIFEST_BYTES_MAX: usize = 3072;
/// Longest tenant name that is kept.
pub const TENANT_NAME_BYTES_MAX: usize = 256;

/// Why a page is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// Shorter than a header.
    #[error("too short for a header page")]
    Short,
    /// All zero: nothing was ever written here.
    #[error("an empty page")]
    Empty,
    /// Something else.
    #[error("no header page (wrong magic)")]
    Magic,
    /// Of another version.
    #[error("header version {found}; this Terrace reads {VERSION}")]
    Version {
        /// Its version.
        found: u16,
    },
    /// Damaged.
    #[error("the header's own checksum does not match")]
    Crc,
    /// The fields contradict each other.
    #[error("impossible field in a header")]
    Field,
}

/// Fills a header page. Bytes behind the header are zeroed.
///
/// # Panics
/// If the page is shorter than 4096 bytes.
pub fn encode_header(header: &BlockHeader, page: &mut [u8]) {
    let (named, rest) = page[..PAGE].split_at_mut(FRAME_HEADER_BYTES);
    named.copy_from_slice(&header_bytes(header));
    rest.fill(0);
}

/// The bytes of a header page that say something.
pub(crate) fn header_bytes(header: &BlockHeader) -> [u8; FRAME_HEADER_BYTES] {
    let mut page = [0; FRAME_HEADER_BYTES];
    page[..8].copy_from_slice(FRAME_MAGIC);
    page[8..10].copy_from_slice(&VERSION.to_le_bytes());
    let flags = if header.parent.is_some() { FLAG_PARENT } else { 0 };
    page[10..12].copy_from_slice(&flags.to_le_bytes());
    page[16..32].copy_from_slice(&header.block.to_bytes());
    page[32..48].copy_from_slice(&header.space.to_bytes());
    page[48..64].copy_from_slice(&header.tenant.to_bytes());
    if let Some(parent) = header.parent {
        page[64..80].copy_from_slice(&parent.to_bytes());
    }
    page[80..88].copy_from_slice(&header.length.get().to_le_bytes());
    page[88..96].copy_from_slice(&header.checksum.get().to_le_bytes());
    page[96..104].copy_from_slice(&header.generation.to_le_bytes());
    page[104..112].copy_from_slice(&header.write_sequence.to_le_bytes());
    let crc = crc(&page[..FRAME_CRC_AT]);
    page[FRAME_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    page
}

/// Reads a header page. Any bytes may be given.
///
/// # Errors
/// Why it is none.
pub fn decode_header(page: &[u8]) -> Result<BlockHeader, BadHeader> {
    let page = page.get(..PAGE).ok_or(BadHeader::Short)?;
    check(page, FRAME_MAGIC, FRAME_CRC_AT)?;
    let flags = u16_at(page, 10);
    let parent = id_at(page, 64);
    let length = u64_at(page, 80);
    let named = flags == FLAG_PARENT || (flags == 0 && parent == [0; 16]);
    let rest_is_zero = is_zero(&page[12..16]) && is_zero(&page[FRAME_HEADER_BYTES..]);
    if !named || !rest_is_zero || length == 0 || length > BLOCK_BYTES_MAX {
        return Err(BadHeader::Field);
    }
    Ok(BlockHeader {
        block: BlockId::from_bytes(id_at(page, 16)),
        space: SpaceId::from_bytes(id_at(page, 32)),
        tenant: TenantId::from_bytes(id_at(page, 48)),
        parent: (flags == FLAG_PARENT).then(|| BlockId::from_bytes(parent)),
        length: ByteCount::new(length),
        checksum: Checksum::new(u64_at(page, 88)),
        generation: u64_at(page, 96),
        write_sequence: u64_at(page, 104),
    })
}

/// The first page of a carved slot. Layout, little-endian:
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | magic `TERRSLT1` |
/// | 8 | 2 | format version, 1 |
/// | 10 | 2 | length of the tenant's name |
/// | 12 | 4 | length of the manifest |
/// | 16 | 16 | space id |
/// | 32 | 16 | tenant id |
/// | 48 | 8 | bytes of a frame, header page included |
/// | 56 | 8 | carve sequence: which of two carvings is newer |
/// | 64 | 8 | generation of the space when the slot was carved |
/// | 72 | 4 | slot, so that a misdirected page is noticed |
/// | 76 | 12 | zero |
/// | 88 | 8 | CRC-64/NVMe over bytes 0 to 88 and 96 to 4096 |
/// | 96 | | tenant's name, then manifest: both may be empty |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotHeader {
    /// Where it belongs.
    pub slot: u32,
    /// The space.
    pub space: SpaceId,
    /// Its tenant.
    pub tenant: TenantId,
    /// Size of a frame.
    pub frame_bytes: ByteCount,
    /// Of two carvings the higher one is newer.
    pub carve_sequence: u64,
    /// Generation of the space then.
    pub generation: u64,
    /// The tenant's name; empty if it was not known.
    pub tenant_name: String,
    /// The space's manifest; empty if it was not known.
    pub manifest: Vec<u8>,
}

impl SlotHeader {
    /// Fills a page.
    ///
    /// # Panics
    /// If the page is shorter than 4096 bytes, or name or manifest longer than allowed: [`crate::Media::put_space`]
    /// refuses those.
    pub fn encode(&self, page: &mut [u8]) {
        assert!(self.tenant_name.len() <= TENANT_NAME_BYTES_MAX, "tenant name too long for a slot header");
        assert!(self.manifest.len() <= MANIFEST_BYTES_MAX, "manifest too long for a slot header");
        let page = &mut page[..PAGE];
        page.fill(0);
        let name = u16::try_from(self.tenant_name.len()).expect("at most 256");
        let manifest = u32::try_from(self.manifest.len()).expect("at most 3072");
        page[..8].copy_from_slice(SLOT_MAGIC);
        page[8..10].copy_from_slice(&VERSION.to_le_bytes());
        page[10..12].copy_from_slice(&name.to_le_bytes());
        page[12..16].copy_from_slice(&manifest.to_le_bytes());
        page[16..32].copy_from_slice(&self.space.to_bytes());
        page[32..48].copy_from_slice(&self.tenant.to_bytes());
        page[48..56].copy_from_slice(&self.frame_bytes.get().to_le_bytes());
        page[56..64].copy_from_slice(&self.carve_sequence.to_le_bytes());
        page[64..72].copy_from_slice(&self.generation.to_le_bytes());
        page[72..76].copy_from_slice(&self.slot.to_le_bytes());
        let name_end = SLOT_FIXED + self.tenant_name.len();
        page[SLOT_FIXED..name_end].copy_from_slice(self.tenant_name.as_bytes());
        page[name_end..name_end + self.manifest.len()].copy_from_slice(&self.manifest);
        let crc = slot_crc(page);
        page[88..96].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads a page. Any bytes may be given.
    ///
    /// # Errors
    /// Why it is none.
    pub fn decode(page: &[u8]) -> Result<Self, BadHeader> {
        let page = page.get(..PAGE).ok_or(BadHeader::Short)?;
        check_magic(page, SLOT_MAGIC)?;
        if u64_at(page, 88) != slot_crc(page) {
            return Err(BadHeader::Crc);
        }
        check_version(page)?;
        let name_bytes = usize::from(u16_at(page, 10));
        let manifest_bytes = usize::try_from(u32_at(page, 12)).map_err(|_| BadHeader::Field)?;
        let frame_bytes = u64_at(page, 48);
        let fits = name_bytes <= TENANT_NAME_BYTES_MAX && manifest_bytes <= MANIFEST_BYTES_MAX;
        let size = PAGE as u64 + 1..=PAGE as u64 + BLOCK_BYTES_MAX;
        if !fits || !size.contains(&frame_bytes) || !frame_bytes.is_multiple_of(PAGE as u64) {
            return Err(BadHeader::Field);
        }
        let (name, rest) = page[SLOT_FIXED..].split_at(name_bytes);
        let tenant_name = std::str::from_utf8(name).map_err(|_| BadHeader::Field)?.to_owned();
        Ok(Self {
            slot: u32_at(page, 72),
            space: SpaceId::from_bytes(id_at(page, 16)),
            tenant: TenantId::from_bytes(id_at(page, 32)),
            frame_bytes: ByteCount::new(frame_bytes),
            carve_sequence: u64_at(page, 56),
            generation: u64_at(page, 64),
            tenant_name,
            manifest: rest[..manifest_bytes].to_vec(),
        })
    }

    /// The space's record, if the header names the manifest.
    pub fn record(&self) -> Option<SpaceRecord> {
        (!self.manifest.is_empty()).then(|| SpaceRecord {
            space: self.space,
            tenant: self.tenant,
            tenant_name: self.tenant_name.clone(),
            generation: self.generation,
            manifest: self.manifest.clone(),
        })
    }
}

fn slot_crc(page: &[u8]) -> u64 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
    digest.update(&page[..88]);
    digest.update(&page[SLOT_FIXED..PAGE]);
    digest.finalize()
}

fn check(page: &[u8], magic: &[u8; 8], crc_at: usize) -> Result<(), BadHeader> {
    check_magic(page, magic)?;
    if u64_at(page, crc_at) != crc(&page[..crc_at]) {
        return Err(BadHeader::Crc);
    }
    check_version(page)
}

fn check_magic(page: &[u8], magic: &[u8; 8]) -> Result<(), BadHeader> {
    if page[..8] == *magic {
        return Ok(());
    }
    Err(if is_zero(page) { BadHeader::Empty } else { BadHeader::Magic })
}

/// A scan asks this of every page: a comparison is ten times as quick as a loop.
fn is_zero(bytes: &[u8]) -> bool {
    const ZERO: &[u8; PAGE] = &[0; PAGE];
    ZERO.get(..bytes.len()).is_some_and(|zero| bytes == zero)
}

fn check_version(page: &[u8]) -> Result<(), BadHeader> {
    match u16_at(page, 8) {
        VERSION => Ok(()),
        found => Err(BadHeader::Version { found }),
    }
}

/// CRC-64/NVMe, as everywhere on disk.
pub(crate) fn crc(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes)
}

/// # Panics
/// These four panic past the end: callers pass whole pages or checked lengths.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn id_at(bytes: &[u8], at: usize) -> [u8; 16] {
    array_at(bytes, at)
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn example() -> BlockHeader {
        BlockHeader {
            block: BlockId::from_bytes([0x11; 16]),
            space: SpaceId::from_bytes([0x22; 16]),
            tenant: TenantId::from_bytes([0x33; 16]),
            parent: Some(BlockId::from_bytes([0x44; 16])),
            length: ByteCount::new(200_000),
            checksum: Checksum::new(0x0102_0304_0506_0708),
            generation: 9,
            write_sequence: 10,
        }
    }

    fn slot_example() -> SlotHeader {
        SlotHeader {
            slot: 3,
            space: SpaceId::from_bytes([0x22; 16]),
            tenant: TenantId::from_bytes([0x33; 16]),
            frame_bytes: ByteCount::new(204_800),
            carve_sequence: 5,
            generation: 6,
            tenant_name: "default".to_owned(),
            manifest: vec![0xaa; 40],
        }
    }

    /// A changed layout would make every device of an older version unreadable:
    /// these bytes were written by version 1 and stay readable for ever.
    #[test]
    fn golden_frame_header() {
        let mut page = [0xffu8; PAGE];
        encode_header(&example(), &mut page);
        let mut golden = Vec::new();
        golden.extend_from_slice(b"TERRFRM1\x01\x00\x01\x00\x00\x00\x00\x00");
        for byte in [0x11, 0x22, 0x33, 0x44] {
            golden.extend_from_slice(&[byte; 16]);
        }
        golden.extend_from_slice(b"\x40\x0d\x03\x00\x00\x00\x00\x00");
        golden.extend_from_slice(b"\x08\x07\x06\x05\x04\x03\x02\x01");
        golden.extend_from_slice(b"\x09\x00\x00\x00\x00\x00\x00\x00");
        golden.extend_from_slice(b"\x0a\x00\x00\x00\x00\x00\x00\x00");
        golden.extend_from_slice(&GOLDEN_FRAME_CRC);
        golden.resize(PAGE, 0);
        assert!(page[..] == golden[..], "{:?}", &page[..128]);
        assert_eq!(decode_header(&golden), Ok(example()));
    }

    /// Computed by another implementation of CRC-64/NVMe, like the next.
    const GOLDEN_FRAME_CRC: [u8; 8] = [31, 163, 87, 115, 126, 222, 4, 119];
    const GOLDEN_SLOT_CRC: u64 = 12_798_249_213_798_823_896;

    /// As above, for the slot header, by its checksum, which covers every byte.
    #[test]
    fn golden_slot_header() {
        let mut page = [0xffu8; PAGE];
        slot_example().encode(&mut page);
        assert_eq!(&page[..16], b"TERRSLT1\x01\x00\x07\x00\x28\x00\x00\x00");
        assert_eq!(u64_at(&page, 88), GOLDEN_SLOT_CRC);
        assert_eq!(SlotHeader::decode(&page), Ok(slot_example()));
    }

    /// The same as files, which no change of this code can change with it.
    #[test]
    fn golden_files() {
        let mut page = [0u8; PAGE];
        encode_header(&example(), &mut page);
        let golden = crate::golden::golden("frame-header-1.bin", &page);
        assert!(golden == page);
        assert_eq!(decode_header(&golden), Ok(example()));
        slot_example().encode(&mut page);
        let golden = crate::golden::golden("slot-header-1.bin", &page);
        assert!(golden == page);
        assert_eq!(SlotHeader::decode(&golden), Ok(slot_example()));
    }

    /// A slot header that names an impossible size of frames would have a reader ask for that much memory.
    #[test]
    fn impossible_frame_sizes_are_refused() {
        for frame_bytes in [0, 4096, 4097, 12_288 + 1, 2 * BLOCK_BYTES_MAX, 1 << 60] {
            let mut page = [0u8; PAGE];
            SlotHeader { frame_bytes: ByteCount::new(frame_bytes), ..slot_example() }.encode(&mut page);
            assert_eq!(SlotHeader::decode(&page), Err(BadHeader::Field), "{frame_bytes}");
        }
    }

    /// An empty page is not damage: a scan meets millions of them.
    #[test]
    fn empty_and_short_pages_are_told_apart() {
        assert_eq!(decode_header(&[0; PAGE]), Err(BadHeader::Empty));
        assert_eq!(SlotHeader::decode(&[0; PAGE]), Err(BadHeader::Empty));
        assert_eq!(decode_header(&[0; 100]), Err(BadHeader::Short));
    }

    /// A page of a version to come must be named as such, not as damage.
    #[test]
    fn a_newer_version_is_named() {
        let mut page = [0u8; PAGE];
        encode_header(&example(), &mut page);
        page[8] = 2;
        let sum = crc(&page[..FRAME_CRC_AT]);
        page[FRAME_CRC_AT..FRAME_CRC_AT + 8].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(decode_header(&page), Err(BadHeader::Version { found: 2 }));
    }

    proptest! {
        /// Every header must come back as it was written.
        #[test]
        fn headers_round_trip(
            block: [u8; 16], parent: Option<[u8; 16]>, length in 1..=BLOCK_BYTES_MAX,
            sum: u64, generation: u64, write_sequence: u64,
        ) {
            let header = BlockHeader {
                block: BlockId::from_bytes(block),
                parent: parent.map(BlockId::from_bytes),
                length: ByteCount::new(length),
                checksum: Checksum::new(sum),
                generation,
                write_sequence,
                ..example()
            };
            let mut page = [0u8; PAGE];
            encode_header(&header, &mut page);
            prop_assert_eq!(decode_header(&page), Ok(header));
        }

        /// One flipped bit anywhere in the page must be noticed.
        #[test]
        fn a_flipped_bit_is_noticed(at in 0..PAGE * 8) {
            let mut page = [0u8; PAGE];
            encode_header(&example(), &mut page);
            page[at / 8] ^= 1 << (at % 8);
            prop_assert!(decode_header(&page).is_err());
            slot_example().encode(&mut page);
            page[at / 8] ^= 1 << (at % 8);
            prop_assert!(SlotHeader::decode(&page).is_err());
        }

        /// Whatever a device returns, decoding must not panic, even where the checksums are right.
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), forge: bool) {
            let mut page = vec![0u8; PAGE];
            page[..bytes.len()].copy_from_slice(&bytes);
            if forge {
                page[..8].copy_from_slice(SLOT_MAGIC);
                page[8..10].copy_from_slice(&VERSION.to_le_bytes());
                let sum = slot_crc(&page);
                page[88..96].copy_from_slice(&sum.to_le_bytes());
                let _ = SlotHeader::decode(&page);
                page[..8].copy_from_slice(FRAME_MAGIC);
                let sum = crc(&page[..FRAME_CRC_AT]);
                page[FRAME_CRC_AT..FRAME_CRC_AT + 8].copy_from_slice(&sum.to_le_bytes());
            }
            let _ = decode_header(&page);
            let _ = SlotHeader::decode(&page);
            let _ = decode_header(&bytes);
        }
    }
}
