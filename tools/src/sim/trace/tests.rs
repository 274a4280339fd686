//! Tests of the trace reader: what a broken or unusual file does.

use std::io::Write;

use super::*;

fn file(text: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text).unwrap();
    file
}

fn read(text: &str) -> anyhow::Result<Trace> {
    Trace::read(file(text.as_bytes()).path(), None, None)
}

const GOOD: &str = r#"{"timestamp": 5, "input_length": 100, "output_length": 3, "hash_ids": [7, 8]}"#;

/// An operator must find the bad line of a large file: the error names file and line.
#[test]
fn a_bad_line_is_named() {
    for bad in [
        "{",
        "[]",
        r#"{"timestamp": 5, "input_length": 100, "output_length": 3}"#,
        r#"{"timestamp": -5, "input_length": 100, "output_length": 3, "hash_ids": []}"#,
        r#"{"timestamp": 5, "input_length": 0, "output_length": 3, "hash_ids": []}"#,
        r#"{"timestamp": 5, "input_length": 99999999999, "output_length": 3, "hash_ids": []}"#,
        r#"{"timestamp": 5, "input_length": 100, "output_length": 3, "hash_ids": [-1]}"#,
        "\u{fffd}",
    ] {
        let file = file(format!("{GOOD}\n\n{bad}\n").as_bytes());
        let error = format!("{:#}", Trace::read(file.path(), None, None).unwrap_err());
        assert!(error.contains(&format!("{}:3", file.path().display())), "{bad}: {error}");
    }
}

/// A file that is empty, missing, or cut off in a zstd frame must not look like a short trace.
#[test]
fn files_that_are_no_traces_are_refused() {
    assert!(format!("{:#}", read("").unwrap_err()).contains("holds no request"));
    let missing = Trace::read(Path::new("no-such-trace.jsonl"), None, None).unwrap_err();
    assert!(format!("{missing:#}").contains("no-such-trace.jsonl"));
    let cut = file(&[0x28, 0xb5, 0x2f, 0xfd, 0x24]);
    assert!(Trace::read(cut.path(), None, None).is_err());
    let whole = ruzstd::encoding::compress_to_vec(
        format!("{GOOD}\n").repeat(5000).as_bytes(),
        ruzstd::encoding::CompressionLevel::Fastest,
    );
    assert_eq!(Trace::read(file(&whole).path(), None, None).unwrap().asks.len(), 5000);
    let said = |bytes: &[u8]| format!("{:#}", Trace::read(file(bytes).path(), None, None).unwrap_err());
    for cut in [whole.len() / 2, 5] {
        let error = said(&whole[..cut]);
        assert!(
            error.contains("is cut short or damaged") && error.contains("copy it again"),
            "{cut}: {error}"
        );
    }
    let gzip = said(&[0x1f, 0x8b, 8, 0, 0, 0]);
    assert!(gzip.contains("compressed with gzip") && gzip.contains("gunzip"), "{gzip}");
    assert!(said(&[b'{', 0xff, 0xfe]).contains("this is no text"));
}

/// A wrong block size would count tokens that are not there: it is told from all prompts, or asked for.
#[test]
fn the_block_size_follows_from_the_prompts() {
    let line = |input: u64, ids: usize| {
        let ids: Vec<usize> = (0..ids).collect();
        format!(r#"{{"timestamp": 0, "input_length": {input}, "output_length": 1, "hash_ids": {ids:?}}}"#)
    };
    assert_eq!(read(&format!("{}\n{}", line(6758, 14), line(512, 1))).unwrap().tokens_per_block, 512);
    assert_eq!(read(&format!("{}\n{}", line(323, 5), line(1007, 15))).unwrap().tokens_per_block, 64);
    let error = read(&format!("{}\n{}", line(6758, 14), line(512, 8))).unwrap_err();
    assert!(format!("{error:#}").contains("--tokens-per-block"), "{error:#}");
    let trace = read(&line(6758, 14)).unwrap();
    assert_eq!(trace.tokens(&trace.asks[0], 13), 6656);
    assert_eq!(trace.tokens(&trace.asks[0], 14), 6758, "the last block may be a partial one");
}

/// Requests that are out of order, or sessions that are mixed up, would break a closed loop.
#[test]
fn requests_are_in_order_and_sessions_are_chained() {
    let line = |at: u64, session: &str| {
        format!(
            r#"{{"timestamp": {at}, "input_length": 16, "output_length": 1, "hash_ids": [{at}], "session_id": {session}}}"#
        )
    };
    let text = [line(300, "1"), line(100, "1"), line(200, "\"a\""), line(400, "\"a\"")].join("\n");
    let trace = read(&text).unwrap();
    assert!(trace.has_sessions);
    assert_eq!(trace.asks.iter().map(|ask| ask.at).collect::<Vec<_>>(), [0, 100_000, 200_000, 300_000]);
    assert_eq!(trace.asks.iter().map(|ask| ask.next).collect::<Vec<_>>(), [Some(2), Some(3), None, None]);
    assert_eq!(trace.asks.iter().map(|ask| ask.follows).collect::<Vec<_>>(), [false, false, true, true]);
}

/// The same id is the same block, in every run; the core hashes by the id's own bits, so they must be spread.
#[test]
fn ids_become_spread_blocks() {
    let trace = read(&format!("{GOOD}\n{GOOD}")).unwrap();
    assert_eq!(trace.distinct(), 2);
    assert_eq!(trace.references(), 4);
    assert_eq!(trace.blocks(&trace.asks[0]), trace.blocks(&trace.asks[1]));
    let ones: u32 = (0..1000).map(|id| block_id(id).as_u128().count_ones()).sum();
    assert!((63_000..65_000).contains(&ones), "{ones} of 128,000 bits are set");
}

/// Further sessions must be as many as asked for and alike, each chained in itself, and take no hits from the recorded
/// ones, nor those from them: one and a half times three sessions, of which two share a block.
#[test]
fn further_sessions_are_alike_and_share_nothing_with_the_recorded() {
    let line = |at: u64, session: u64, ids: &[u64]| {
        let input = ids.len() * 16;
        format!(
            r#"{{"timestamp": {at}, "input_length": {input}, "output_length": 1, "hash_ids": {ids:?}, "session_id": {session}}}"#
        )
    };
    let text =
        [line(0, 1, &[7]), line(50, 2, &[7, 8]), line(70, 1, &[7, 9]), line(90, 3, &[5, 6])].join("\n");
    let recorded = read(&text).unwrap();
    let twice = read(&text).unwrap().with_sessions(2.0).unwrap();
    assert_eq!((twice.asks.len(), twice.distinct()), (8, 10));
    let starts = |trace: &Trace| {
        let firsts = trace.asks.iter().filter(|ask| !ask.follows);
        firsts.map(|ask| (ask.at, trace.blocks(ask).len())).collect::<Vec<_>>()
    };
    assert_eq!(starts(&recorded), [(0, 1), (50_000, 2), (90_000, 2)]);
    // The span is 90,001 us: copies begin 45,000 us later, and from its end on at its beginning.
    assert_eq!(starts(&twice), [(0, 1), (4_999, 2), (44_999, 2), (45_000, 1), (50_000, 2), (90_000, 2)]);
    let old: Vec<BlockId> = recorded.ids().to_vec();
    let mut of_copies = 0;
    for ask in &twice.asks {
        let blocks = twice.blocks(ask);
        let known = blocks.iter().filter(|block| old.contains(block)).count();
        assert!(known == 0 || known == blocks.len(), "a prompt is recorded or a copy");
        of_copies += usize::from(known == 0);
        if let Some(next) = ask.next {
            let next = &twice.asks[next as usize];
            assert_eq!((next.at - ask.at, next.follows), (70_000, true));
            assert_eq!(twice.blocks(next)[0], blocks[0], "a session goes on with its own blocks");
        }
    }
    assert_eq!(of_copies, 4);
    let many = read(&text).unwrap().with_sessions(20.5).unwrap();
    let sessions = many.asks.iter().filter(|ask| !ask.follows).count();
    assert!((60..=63).contains(&sessions), "{sessions} sessions");
    assert!(read(GOOD).unwrap().with_sessions(2.0).is_err(), "no sessions");
    assert!(read(&text).unwrap().with_sessions(1e-9).is_err(), "none is drawn");
}
