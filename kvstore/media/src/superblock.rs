//! The superblock: what a device is, and which generations it may still serve.
//!
//! The first MiB of a device holds two copies, at 0 and at 512 KiB, written in
//! turn, so that a torn write leaves the older one. Layout of a copy,
//! little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `TERRSUP1` |
//! | 8 | 4 | major format version, 1: a reader of an older one refuses |
//! | 12 | 4 | minor format version, 0: a reader of an older one goes on |
//! | 16 | 16 | device uuid |
//! | 32 | 16 | node id |
//! | 48 | 8 | chunk_bytes |
//! | 56 | 4 | slots |
//! | 60 | 4 | incarnation of the daemon that wrote it |
//! | 64 | 8 | sequence: the valid copy with the higher one counts |
//! | 72 | 4 | entries of the table |
//! | 76 | 12 | zero |
//! | 88 | 8 | CRC-64/NVMe over the table |
//! | 96 | 8 | CRC-64/NVMe over bytes 0 to 96 |
//! | 4096 | 40 each | table: tenant id, space id, lowest valid generation |
//!
//! Magic and versions come first and never move, so that any Terrace can tell
//! that a device is too new for it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use terrace_core::{ByteCount, SpaceId, TenantId};

use crate::api::MediaError;
use crate::device::AlignedPages;
use crate::header::{crc, id_at, u32_at, u64_at};
use crate::side::SideIo;

/// Where slot 0 begins.
pub const DATA_START: u64 = terrace_core::DATA_START;
const _: () = assert!(DATA_START == 1 << 20);
const COPY_BYTES: u64 = 512 << 10;
const MAGIC: &[u8; 8] = b"TERRSUP1";
/// Format that this code writes.
pub(crate) const MAJOR: u32 = 1;
const MINOR: u32 = 0;
const HEADER: usize = 4096;
const ENTRY: usize = 40;
/// Entries that a copy holds.
pub(crate) const CLEARED_MAX: usize = 10_000;
const _: () = assert!(HEADER + CLEARED_MAX * ENTRY <= 512 << 10);

/// A device's identity and its table of cleared spaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) uuid: [u8; 16],
    pub(crate) node: [u8; 16],
    pub(crate) chunk_bytes: ByteCount,
    pub(crate) slots: u32,
    pub(crate) incarnation: u32,
    pub(crate) sequence: u64,
    pub(crate) cleared: BTreeMap<(TenantId, SpaceId), u64>,
}

/// What a copy holds.
#[derive(Debug, PartialEq, Eq)]
enum Copy {
    Valid(Superblock),
    /// Of this major version, whose layout we cannot judge.
    Newer(u32),
    /// The magic is there, the rest does not add up.
    Damaged,
    /// Only zeros.
    Empty,
    /// Something else.
    Foreign,
}

/// What a copy of a superblock holds, for inspection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyState {
    /// A superblock.
    Valid(SuperblockFacts),
    /// One of this newer major format.
    Newer(u32),
    /// One that does not add up.
    Damaged,
    /// Only zeros.
    Empty,
    /// Something else.
    Foreign,
}

impl CopyState {
    /// What it says, if it is valid.
    pub const fn facts(&self) -> Option<&SuperblockFacts> {
        match self {
            Self::Valid(facts) => Some(facts),
            Self::Newer(_) | Self::Damaged | Self::Empty | Self::Foreign => None,
        }
    }

    /// Its major format, if that is newer than ours.
    pub const fn newer(&self) -> Option<u32> {
        match self {
            Self::Newer(found) => Some(*found),
            Self::Valid(_) | Self::Damaged | Self::Empty | Self::Foreign => None,
        }
    }
}

/// What a superblock says, for inspection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuperblockFacts {
    /// Identity of the device.
    pub uuid: [u8; 16],
    /// Its node.
    pub node: [u8; 16],
    /// Size of a slot.
    pub chunk_bytes: ByteCount,
    /// Slots.
    pub slots: u32,
    /// The life of the daemon that wrote it.
    pub incarnation: u32,
    /// Of two copies the higher one counts.
    pub sequence: u64,
    /// Lowest valid generation of each space that was cleared.
    pub cleared: Vec<(TenantId, SpaceId, u64)>,
}

impl From<Copy> for CopyState {
    fn from(copy: Copy) -> Self {
        match copy {
            Copy::Valid(found) => Self::Valid(SuperblockFacts {
                uuid: found.uuid,
                node: found.node,
                chunk_bytes: found.chunk_bytes,
                slots: found.slots,
                incarnation: found.incarnation,
                sequence: found.sequence,
                cleared: found
                    .cleared
                    .into_iter()
                    .map(|((tenant, space), lowest)| (tenant, space, lowest))
                    .collect(),
            }),
            Copy::Newer(found) => Self::Newer(found),
            Copy::Damaged => Self::Damaged,
            Copy::Empty => Self::Empty,
            Copy::Foreign => Self::Foreign,
        }
    }
}

fn read_copies(side: &SideIo, path: &Path) -> Result<[Copy; 2], MediaError> {
    let failed = |source| MediaError::File { path: path.to_owned(), action: "read its superblock", source };
    let one = |offset| -> Result<Copy, MediaError> {
        let mut pages = side.read_many(&[(offset, COPY_BYTES)]).map_err(failed)?;
        let page = pages.pop().unwrap_or_else(|| Ok(AlignedPages::new(COPY_BYTES))).map_err(failed)?;
        Ok(decode(page.as_slice()))
    };
    Ok([one(0)?, one(COPY_BYTES)?])
}

impl Superblock {
    /// Both copies, for inspection.
    pub(crate) fn copies(side: &SideIo, path: &Path) -> Result<[CopyState; 2], MediaError> {
        Ok(read_copies(side, path)?.map(CopyState::from))
    }

    /// Reads the newer of the two copies; `None` if the whole area is zero.
    pub(crate) fn read(side: &SideIo, path: &Path) -> Result<Option<Self>, MediaError> {
        let copies = read_copies(side, path)?;
        let newer = copies.iter().find_map(|copy| match copy {
            Copy::Newer(found) => Some(*found),
            Copy::Valid(_) | Copy::Damaged | Copy::Empty | Copy::Foreign => None,
        });
        if let Some(found) = newer {
            return Err(MediaError::NewerFormat { path: path.to_owned(), found, known: MAJOR });
        }
        let (ours, empty) = copies.iter().fold((false, true), |(ours, empty), copy| {
            (ours || *copy == Copy::Damaged, empty && *copy == Copy::Empty)
        });
        let best = copies.into_iter().filter_map(|copy| match copy {
            Copy::Valid(superblock) => Some(superblock),
            Copy::Newer(_) | Copy::Damaged | Copy::Empty | Copy::Foreign => None,
        });
        match best.max_by_key(|superblock| superblock.sequence) {
            Some(superblock) => Ok(Some(superblock)),
            None if empty => Ok(None),
            None if ours => Err(MediaError::SuperblockDamaged { path: path.to_owned() }),
            None => Err(MediaError::NotOurs { path: path.to_owned() }),
        }
    }

    /// Writes the next copy by `write`, which also syncs; the older copy stays as it was.
    pub(crate) fn write(
        &mut self,
        path: &Path,
        write: impl FnOnce(u64, AlignedPages) -> io::Result<()>,
    ) -> Result<(), MediaError> {
        if self.cleared.len() > CLEARED_MAX {
            return Err(MediaError::TableFull { path: path.to_owned(), limit: CLEARED_MAX });
        }
        let mut next = self.clone();
        next.sequence += 1;
        let offset = if next.sequence.is_multiple_of(2) { 0 } else { COPY_BYTES };
        write(offset, next.encode()).map_err(|source| MediaError::File {
            path: path.to_owned(),
            action: "write its superblock",
            source,
        })?;
        *self = next;
        Ok(())
    }

    /// May a header of this generation be served?
    pub(crate) fn allows(&self, tenant: TenantId, space: SpaceId, generation: u64) -> bool {
        self.cleared.get(&(tenant, space)).is_none_or(|lowest| generation >= *lowest)
    }

    fn encode(&self) -> AlignedPages {
        let table_bytes = self.cleared.len() * ENTRY;
        let mut pages = AlignedPages::new((HEADER + table_bytes) as u64);
        let (page, table) = pages.as_mut_slice().split_at_mut(HEADER);
        for (entry, ((tenant, space), lowest)) in table.chunks_exact_mut(ENTRY).zip(&self.cleared) {
            entry[..16].copy_from_slice(&tenant.to_bytes());
            entry[16..32].copy_from_slice(&space.to_bytes());
            entry[32..].copy_from_slice(&lowest.to_le_bytes());
        }
        let entries = u32::try_from(self.cleared.len()).expect("write refuses more than 10,000");
        page[..8].copy_from_slice(MAGIC);
        page[8..12].copy_from_slice(&MAJOR.to_le_bytes());
        page[12..16].copy_from_slice(&MINOR.to_le_bytes());
        page[16..32].copy_from_slice(&self.uuid);
        page[32..48].copy_from_slice(&self.node);
        page[48..56].copy_from_slice(&self.chunk_bytes.get().to_le_bytes());
        page[56..60].copy_from_slice(&self.slots.to_le_bytes());
        page[60..64].copy_from_slice(&self.incarnation.to_le_bytes());
        page[64..72].copy_from_slice(&self.sequence.to_le_bytes());
        page[72..76].copy_from_slice(&entries.to_le_bytes());
        page[88..96].copy_from_slice(&crc(&table[..table_bytes]).to_le_bytes());
        let sum = crc(&page[..96]);
        page[96..104].copy_from_slice(&sum.to_le_bytes());
        pages
    }
}

fn decode(bytes: &[u8]) -> Copy {
    let Some(page) = bytes.get(..HEADER) else { return Copy::Foreign };
    if page[..8] != *MAGIC {
        return if bytes.iter().all(|byte| *byte == 0) { Copy::Empty } else { Copy::Foreign };
    }
    let major = u32_at(page, 8);
    if major > MAJOR {
        return Copy::Newer(major);
    }
    if u64_at(page, 96) != crc(&page[..96]) {
        return Copy::Damaged;
    }
    let (chunk_bytes, slots) = (u64_at(page, 48), u32_at(page, 56));
    // Where a slot lies is computed from these two everywhere.
    let end = u64::from(slots).checked_mul(chunk_bytes).and_then(|bytes| bytes.checked_add(DATA_START));
    if end.is_none_or(|end| end > i64::MAX as u64) {
        return Copy::Damaged;
    }
    let entries = u32_at(page, 72) as usize;
    let table = entries.checked_mul(ENTRY).and_then(|length| bytes.get(HEADER..HEADER + length));
    let Some(table) = table.filter(|_| entries <= CLEARED_MAX) else { return Copy::Damaged };
    if crc(table) != u64_at(page, 88) {
        return Copy::Damaged;
    }
    let cleared = table.chunks_exact(ENTRY).map(|entry| {
        let key = (TenantId::from_bytes(id_at(entry, 0)), SpaceId::from_bytes(id_at(entry, 16)));
        (key, u64_at(entry, 32))
    });
    Copy::Valid(Superblock {
        uuid: id_at(page, 16),
        node: id_at(page, 32),
        chunk_bytes: ByteCount::new(u64_at(page, 48)),
        slots: u32_at(page, 56),
        incarnation: u32_at(page, 60),
        sequence: u64_at(page, 64),
        cleared: cleared.collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use super::*;
    use crate::api::Backend;
    use crate::device::DeviceFile;

    fn example() -> Superblock {
        Superblock {
            uuid: [1; 16],
            node: [2; 16],
            chunk_bytes: ByteCount::new(64 << 20),
            slots: 9,
            incarnation: 4,
            sequence: 0,
            cleared: BTreeMap::from([((TenantId::from_bytes([5; 16]), SpaceId::from_bytes([6; 16])), 7)]),
        }
    }

    fn side(folder: &tempfile::TempDir, backend: Backend) -> (SideIo, std::path::PathBuf) {
        let path = folder.path().join("device");
        let file = DeviceFile::open(&path, 1 << 21).unwrap();
        file.preallocate(1 << 21).unwrap();
        (SideIo::new(Arc::new(file), backend), path)
    }

    fn write(superblock: &mut Superblock, side: &SideIo, path: &Path) -> Result<(), MediaError> {
        superblock.write(path, |offset, pages| side.write_synced(offset, pages))
    }

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir_in(option_env!("CARGO_TARGET_DIR").unwrap_or(".")).unwrap()
    }

    /// A power cut while a superblock is written must leave the one before: the
    /// newer copy is damaged page by page, and the older one must be read.
    #[test]
    fn a_torn_copy_leaves_the_older_one() {
        for backend in [Backend::IoUring, Backend::Pread] {
            let folder = folder();
            let (side, path) = side(&folder, backend);
            assert_eq!(Superblock::read(&side, &path).unwrap(), None);
            let mut superblock = example();
            write(&mut superblock, &side, &path).unwrap();
            superblock.incarnation = 5;
            write(&mut superblock, &side, &path).unwrap();
            assert_eq!(Superblock::read(&side, &path).unwrap().unwrap(), superblock);
            // Sequence 2 lies at 0.
            let raw = std::fs::File::options().write(true).open(&path).unwrap();
            for at in [4096 + 33, 60] {
                raw.write_all_at(&[0xff], at).unwrap();
                let older = Superblock::read(&side, &path).unwrap().unwrap();
                assert_eq!((older.incarnation, older.sequence), (4, 1), "damage at {at}");
            }
            raw.write_all_at(&[0xff], COPY_BYTES + 60).unwrap();
            assert!(matches!(Superblock::read(&side, &path), Err(MediaError::SuperblockDamaged { .. })));
        }
    }

    /// An older Terrace must not touch what a newer one wrote, even if it
    /// cannot read anything but the version.
    #[test]
    fn a_newer_major_is_refused_and_untouched() {
        let folder = folder();
        let (side, path) = side(&folder, Backend::Auto);
        let mut superblock = example();
        write(&mut superblock, &side, &path).unwrap();
        let raw = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        raw.write_all_at(MAGIC, 0).unwrap();
        raw.write_all_at(&(MAJOR + 1).to_le_bytes(), 8).unwrap();
        let before = std::fs::read(&path).unwrap();
        let error = Superblock::read(&side, &path).unwrap_err();
        assert!(matches!(error, MediaError::NewerFormat { found: 2, known: 1, .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    /// A minor version says that old readers may go on: they must.
    #[test]
    fn a_newer_minor_is_read() {
        let mut pages = example().encode();
        let page = pages.as_mut_slice();
        page[12..16].copy_from_slice(&9u32.to_le_bytes());
        let sum = crc(&page[..96]);
        page[96..104].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(decode(pages.as_slice()), Copy::Valid(example()));
    }

    /// The table must not grow past its copy: one entry too many is refused, and nothing is written.
    #[test]
    fn a_full_table_is_refused() {
        let folder = folder();
        let (side, path) = side(&folder, Backend::Pread);
        let mut superblock = example();
        let many = (0..CLEARED_MAX as u128 + 1)
            .map(|n| ((TenantId::from_bytes([0; 16]), SpaceId::from_bytes(n.to_le_bytes())), 1));
        superblock.cleared = many.collect();
        assert!(matches!(write(&mut superblock, &side, &path), Err(MediaError::TableFull { .. })));
        superblock.cleared.pop_first();
        write(&mut superblock, &side, &path).unwrap();
        assert_eq!(Superblock::read(&side, &path).unwrap().unwrap(), superblock);
    }

    /// A superblock of the first format must be read for ever, and written as it was.
    #[test]
    fn golden_superblock() {
        let mut superblock = Superblock { sequence: 12, ..example() };
        superblock.cleared.insert((TenantId::from_bytes([8; 16]), SpaceId::from_bytes([9; 16])), 10);
        let today = superblock.encode();
        let golden = crate::golden::golden("superblock-1.0.bin", today.as_slice());
        assert!(golden == today.as_slice());
        assert_eq!(decode(&golden), Copy::Valid(superblock));
    }

    /// Slots that reach beyond what a file can hold would overflow wherever their place is computed.
    #[test]
    fn impossible_sizes_are_damage() {
        for (chunk_bytes, slots) in [(u64::MAX, 9), (1 << 62, 9), (1 << 40, u32::MAX)] {
            let superblock = Superblock { chunk_bytes: ByteCount::new(chunk_bytes), slots, ..example() };
            assert_eq!(decode(superblock.encode().as_slice()), Copy::Damaged, "{chunk_bytes} x {slots}");
        }
    }

    proptest::proptest! {
        /// Bytes with the right checksums but any fields must be survived as well, and take no more memory than
        /// their table.
        #[test]
        fn decoding_survives_forged_fields(
            fields in proptest::collection::vec(proptest::num::u8::ANY, 88), entries: u32, length in 0usize..9000,
        ) {
            let mut bytes = vec![0u8; HEADER + 4096];
            bytes[..88].copy_from_slice(&fields);
            bytes[..8].copy_from_slice(MAGIC);
            bytes[8..12].copy_from_slice(&MAJOR.to_le_bytes());
            bytes[72..76].copy_from_slice(&(entries % 200).to_le_bytes());
            let table = (entries as usize % 200 * ENTRY).min(4096);
            let sum = crc(&bytes[HEADER..HEADER + table]);
            bytes[88..96].copy_from_slice(&sum.to_le_bytes());
            let sum = crc(&bytes[..96]);
            bytes[96..104].copy_from_slice(&sum.to_le_bytes());
            if let Copy::Valid(found) = decode(&bytes) {
                proptest::prop_assert!(found.cleared.len() * ENTRY <= bytes.len());
            }
            decode(&bytes[..length.min(bytes.len())]);
        }

        /// Any bytes may lie where a superblock should be; decoding must survive them.
        #[test]
        fn decoding_survives_any_change(at in 0usize..8192, value: u8, cut in 0usize..8192) {
            let mut bytes = example().encode().as_slice().to_vec();
            let changed = at < bytes.len() && bytes[at] != value;
            if changed {
                bytes[at] = value;
            }
            let decoded = decode(&bytes);
            let covered = at < 104 || (4096..4136).contains(&at);
            proptest::prop_assert_eq!(decoded == Copy::Valid(example()), !(changed && covered));
            decode(&bytes[..cut.min(bytes.len())]);
        }
    }
}
