//! Formats of the catalog: what is older is read and brought up to date, what is newer is refused untouched.

use std::collections::BTreeMap;

use terrace_core::{ByteCount, Checksum, TenantId};

use super::*;
use crate::header::crc;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(option_env!("CARGO_TARGET_DIR").unwrap_or(".")).unwrap()
}

fn open(path: &Path) -> Result<Catalog, CatalogError> {
    Catalog::open(path, Arc::default()).map(|(catalog, _)| catalog)
}

fn header(number: u8) -> BlockHeader {
    BlockHeader {
        block: BlockId::from_bytes([number; 16]),
        space: SpaceId::from_bytes([2; 16]),
        tenant: TenantId::from_bytes([3; 16]),
        parent: (number > 1).then(|| BlockId::from_bytes([number - 1; 16])),
        length: ByteCount::new(4096),
        checksum: Checksum::new(5),
        generation: 6,
        write_sequence: 7,
    }
}

fn frame(index: u32) -> DiskFrame {
    DiskFrame { device: DeviceId::new(0), slot: 1, index }
}

/// A value as the first format had it.
fn old_value(frame: DiskFrame, header: &BlockHeader) -> Vec<u8> {
    let mut value = vec![1];
    value.extend_from_slice(&frame.device.get().to_le_bytes());
    value.extend_from_slice(&frame.slot.to_le_bytes());
    value.extend_from_slice(&frame.index.to_le_bytes());
    value.extend_from_slice(&header.space.to_bytes());
    value.extend_from_slice(&header.tenant.to_bytes());
    value.push(u8::from(header.parent.is_some()));
    value.extend_from_slice(&header.parent.map_or([0; 16], BlockId::to_bytes));
    value.extend_from_slice(&header.length.get().to_le_bytes());
    value.extend_from_slice(&header.checksum.get().to_le_bytes());
    value.extend_from_slice(&header.generation.to_le_bytes());
    value.extend_from_slice(&header.write_sequence.to_le_bytes());
    value.extend_from_slice(&[0; 23]);
    let sum = crc(&value);
    value.extend_from_slice(&sum.to_le_bytes());
    value
}

fn found(catalog: &Catalog) -> Vec<FoundHeader> {
    let mut all = Vec::new();
    catalog.blocks(3, &mut |found| all.extend(found)).unwrap();
    all.sort_by_key(|found| found.header.block);
    all
}

/// Every file of a folder with its bytes.
fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

/// An upgrade must lose nothing: a catalog of the first format is opened, its blocks are read, and what
/// is written from then on has the new format beside them. The first Terrace must then refuse it.
#[test]
fn the_first_format_is_read_and_brought_up_to_date() {
    let folder = folder();
    let path = folder.path().join("catalog");
    {
        let store = open_store(&path).unwrap();
        store.put(key(KEY_META, b"format"), 1u32.to_le_bytes()).unwrap();
        for number in 1..=9 {
            let header = header(number);
            let value = old_value(frame(number.into()), &header);
            store.put(key(KEY_BLOCK, &header.block.to_bytes()), value).unwrap();
        }
    }
    let catalog = open(&path).unwrap();
    let stats = UseStats { depth: 4, turn: 5, uses: 6 };
    let mut batch = Batch::default();
    batch.put_block(frame(10), &header(10), stats);
    catalog.write(batch).unwrap();
    drop(catalog);
    let catalog = open(&path).unwrap();
    let all = found(&catalog);
    assert_eq!(all.len(), 10);
    assert_eq!(all[2], FoundHeader { frame: frame(3), header: header(3), stats: UseStats::default() });
    assert_eq!(all[9], FoundHeader { frame: frame(10), header: header(10), stats });
    assert_eq!(catalog.meta("format").unwrap(), Some(FORMAT.to_le_bytes().to_vec()), "what the first reads");
    assert_eq!(marked_format(&path), Some((FORMAT, MINOR)));
}

/// What a newer Terrace wrote must be refused by its number and left as it is, down to the last byte: by
/// the file, before RocksDB writes into the folder, and by the entry where the file is lost.
#[test]
fn a_newer_major_is_refused_and_untouched() {
    let folder = folder();
    let path = folder.path().join("catalog");
    drop(open(&path).unwrap());
    std::fs::write(path.join(FORMAT_FILE), "terrace catalog 3.1\n").unwrap();
    let before = files(&path);
    let error = open(&path).err().unwrap();
    assert!(matches!(error, CatalogError::NewerFormat { found: 3, .. }), "{error}");
    assert_eq!(Catalog::open_read_only(&path, folder.path()).err(), Some(error));
    assert!(files(&path) == before, "a refused catalog was touched");
    std::fs::remove_file(path.join(FORMAT_FILE)).unwrap();
    open_store(&path).unwrap().put(key(KEY_META, b"format"), 3u32.to_le_bytes()).unwrap();
    assert!(matches!(open(&path).err().unwrap(), CatalogError::NewerFormat { found: 3, .. }));
    assert_eq!(open_store(&path).unwrap().get(key(KEY_META, b"format")).unwrap().unwrap(), [3, 0, 0, 0]);
}

/// A later minor says that we may go on: we must, and leave its mark.
#[test]
fn a_newer_minor_is_read() {
    let folder = folder();
    let path = folder.path().join("catalog");
    drop(open(&path).unwrap());
    std::fs::write(path.join(FORMAT_FILE), "terrace catalog 2.7\n").unwrap();
    let catalog = open(&path).unwrap();
    assert!(catalog.usable());
    assert_eq!(marked_format(&path), Some((2, 7)));
}

/// A file that says nothing sensible must not stop a start, nor a broken entry be taken for a format.
#[test]
fn a_damaged_format_is_not_a_newer_one() {
    let folder = folder();
    let path = folder.path().join("catalog");
    drop(open(&path).unwrap());
    for text in ["", "terrace catalog x.y\n", "terrace catalog 99999999999.0\n", "\u{0}"] {
        std::fs::write(path.join(FORMAT_FILE), text).unwrap();
        assert!(open(&path).is_ok(), "{text:?}");
        assert_eq!(marked_format(&path), Some((FORMAT, MINOR)), "{text:?}");
    }
    open_store(&path).unwrap().put(key(KEY_META, b"format"), [1, 2, 3]).unwrap();
    assert!(matches!(open(&path).err().unwrap(), CatalogError::Damaged { .. }));
}

/// A start that dies right after it made a catalog must not leave one that seems to know that there are no
/// blocks: the mark of an incomplete one is in its first batch.
#[test]
fn a_new_catalog_is_incomplete_from_its_first_batch_on() {
    let folder = folder();
    let path = folder.path().join("catalog");
    drop(open(&path).unwrap());
    let catalog = open(&path).unwrap();
    assert_eq!(catalog.meta("rebuild").unwrap(), Some(vec![1]));
    let moved_to = catalog.renew(Batch::default()).unwrap();
    assert!(moved_to.exists());
    assert_eq!(catalog.meta("rebuild").unwrap(), Some(vec![1]));
    assert_eq!(catalog.format().unwrap(), Some(FORMAT));
}

/// Several threads read the blocks: at each boundary between them one could be lost or told twice.
#[test]
fn ranges_cover_every_block_once() {
    for count in 1..=4 {
        let all: Vec<_> = ranges(count).collect();
        assert_eq!(all.len(), usize::from(count));
        assert_eq!((&all[0].0, &all[all.len() - 1].1), (&vec![KEY_BLOCK], &vec![KEY_BLOCK + 1]));
        assert!(all.windows(2).all(|pair| pair[0].1 == pair[1].0), "{all:?}");
        assert!(all.iter().all(|(from, to)| from < to), "{all:?}");
    }
}

/// Reading a catalog offline must not change a file of it, and must see what only its log holds.
#[test]
fn reading_only_changes_nothing() {
    let (folder, logs) = (folder(), folder());
    let path = folder.path().join("catalog");
    let catalog = open(&path).unwrap();
    let mut batch = Batch::default();
    batch.put_block(frame(1), &header(1), UseStats::default());
    catalog.write(batch).unwrap();
    drop(catalog);
    let before = files(&path);
    let catalog = Catalog::open_read_only(&path, logs.path()).unwrap();
    assert_eq!(found(&catalog).len(), 1);
    assert_eq!(catalog.write(Batch::default()), Err(catalog.closed()), "nothing is written");
    drop(catalog);
    assert!(files(&path) == before, "reading changed a file");
}
