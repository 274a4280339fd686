//! What is read of messages that others wrote, and what becomes of messages that nobody should write.

mod vectors;

use super::msgpack::{Reader, Skipped, Value};
use super::*;

use vectors::*;

const FIRST: u64 = 2_233_398_808_101_521_225;
const SECOND: u64 = 17_911_472_383_915_781_900;

fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.replace(' ', "");
    (0..digits.len() / 2).map(|index| u8::from_str_radix(&digits[2 * index..][..2], 16).unwrap()).collect()
}

fn vectors() -> Vec<Vec<u8>> {
    let engines = [VLLM_MAP, VLLM_ARRAY, VLLM_SALTED, SGLANG, OURS];
    let dynamo = [DYNAMO_STORED, DYNAMO_REMOVED, DYNAMO_CLEARED, DYNAMO_OWNED];
    engines.iter().chain(&dynamo).map(|hex| bytes(hex)).collect()
}

fn stored(blocks: &[u64], tokens: &[u32], tiers: TierSet) -> Stored {
    Stored {
        parent: None,
        blocks: blocks.to_vec(),
        content: Content::Tokens(tokens.to_vec()),
        block_size: 2,
        tiers,
        group: None,
        identity: Identity::Tokens,
    }
}

/// A field could be read as another one, or the two forms of an event be read differently.
#[test]
fn both_forms_of_vllm_say_the_same() {
    let events = vec![
        Event::Stored(Stored {
            group: Some(0),
            ..stored(&[FIRST, SECOND], &[1, 200, 70_000, 4], TierSet::HBM)
        }),
        Event::Removed { blocks: vec![FIRST], tiers: TierSet::PINNED, group: Some(1) },
        Event::Cleared,
    ];
    let batch = Batch { seconds: 1.5, events, rank: Some(3) };
    assert_eq!(decode(&bytes(VLLM_MAP)), Ok(batch.clone()));
    assert_eq!(decode(&bytes(VLLM_ARRAY)), Ok(batch));
}

/// A salted block could be taken for one that every request may use; a block without tokens for no block.
#[test]
fn salts_and_missing_tokens_are_told() {
    let batch = decode(&bytes(VLLM_SALTED)).unwrap();
    let salted = Stored {
        parent: Some(SECOND),
        identity: Identity::MoreThanTokens,
        ..stored(&[FIRST], &[5, 6], TierSet::NVME)
    };
    let bare = Stored { content: Content::Unknown, block_size: 0, ..stored(&[9], &[], TierSet::PINNED) };
    assert_eq!(batch.events, [Event::Stored(salted), Event::Stored(bare)]);
    assert_eq!(batch.rank, None);
}

/// Signed hashes could lose their sign bit, and an event without a medium be refused.
#[test]
fn sglangs_batches_are_read() {
    let below_zero = (-3i64).cast_unsigned();
    let batch = decode(&bytes(SGLANG)).unwrap();
    let first =
        Stored { parent: Some(6_738_917_275_443_968_386), ..stored(&[below_zero], &[7, 8], TierSet::PINNED) };
    let salted = Stored { identity: Identity::MoreThanTokens, ..stored(&[5], &[7, 8], TierSet::HBM) };
    let removed = Event::Removed { blocks: vec![below_zero], tiers: TierSet::NVME, group: None };
    assert_eq!(batch.events, [Event::Stored(first), Event::Stored(salted), removed]);
    assert_eq!(batch.rank, Some(0));
}

/// Events that come as pairs of tokens, that leave out blocks, or that put a salt or pictures into the list.
#[test]
fn odd_events_are_read_for_what_they_say() {
    let one = |event: &[u8]| {
        let mut batch = bytes("93cb000000000000000091");
        batch.extend_from_slice(event);
        batch.push(0xc0);
        match decode(&batch).unwrap().events.remove(0) {
            Event::Stored(stored) => stored,
            other => panic!("{other:?}"),
        }
    };
    let tag = [&[0x95, 0xab][..], b"BlockStored"].concat();
    let pairs = one(&[&tag[..], &bytes("9101c092920102920203")[..], &[2]].concat());
    assert_eq!(pairs.content, Content::Tokens(vec![1, 2]));
    assert_eq!(pairs.identity, Identity::MoreThanTokens);
    let fewer = one(&[&tag[..], &bytes("9101c09401020304")[..], &[2]].concat());
    assert_eq!(fewer.content, Content::Unknown, "two blocks of tokens, one hash");
    let long = [&[0x9b, 0xab][..], b"BlockStored"].concat();
    let pictures = one(&[&long[..], &bytes("9101c0920102 02c0c0c0c0 91a170 07")[..]].concat());
    assert_eq!((pictures.group, pictures.identity), (Some(7), Identity::MoreThanTokens));
    let salt = [&[0x98, 0xab][..], b"BlockStored"].concat();
    let salted = one(&[&salt[..], &bytes("9101c092010202c0c081a173a178")[..]].concat());
    assert_eq!(salted.identity, Identity::MoreThanTokens);
}

/// Tier and owner stand beside the event, before or after it; an owner's id must not change on the way.
#[test]
fn dynamos_events_are_read() {
    let own = Stored {
        parent: Some(15_310_707_395_893_867_146),
        content: Content::Hashes(vec![42]),
        block_size: 0,
        ..stored(&[13_769_157_705_258_532_664], &[], TierSet::PINNED)
    };
    let first = RouterEvent {
        worker: 7,
        rank: 1,
        number: 3,
        domain: Domain::Worker,
        event: Event::Stored(own.clone()),
    };
    assert_eq!(decode_dynamo(&bytes(DYNAMO_STORED)), Ok(vec![first.clone()]));
    let removed = Event::Removed { blocks: vec![1, u64::MAX], tiers: TierSet::NVME, group: None };
    let pool = Domain::CacheOwner { id: None };
    let second = RouterEvent { number: 4, domain: pool, event: removed, ..first.clone() };
    let third = RouterEvent { number: 5, event: Event::Cleared, ..first.clone() };
    let list = [&[0x93][..], &bytes(DYNAMO_STORED), &bytes(DYNAMO_REMOVED), &bytes(DYNAMO_CLEARED)].concat();
    assert_eq!(decode_dynamo(&list), Ok(vec![first, second, third]));
    let owned = decode_dynamo(&bytes(DYNAMO_OWNED)).unwrap().remove(0);
    let key = b"state_source";
    let all = bytes(DYNAMO_OWNED);
    let at = all.windows(key.len()).position(|window| window == key).unwrap() + key.len();
    assert_eq!(owned.domain, Domain::CacheOwner { id: Some(all[at..].to_vec()) });
    assert_eq!(owned.event, Event::Stored(Stored { tiers: TierSet::NVME, ..own }));
}

/// What we publish must be what vLLM's own classes write, byte for byte, and come back as it was.
#[test]
fn what_we_publish_is_read_back() {
    let (blocks, many) = ([FIRST, SECOND], (0..20).collect::<Vec<u64>>());
    let moves = [
        Move::Stored {
            parent: Some(300),
            blocks: &blocks,
            tokens: &[1, 200, 70_000, 4],
            block_size: 2,
            medium: Medium::CpuPinned,
        },
        Move::Removed { blocks: &many, medium: Medium::Disk },
        Move::Removed { blocks: &[1], medium: Medium::External },
        Move::Cleared,
    ];
    let encoded = encode(1.5, &moves, Some(3));
    assert_eq!(encoded, bytes(OURS));
    let tokens = [1, 200, 70_000, 4];
    let expected = vec![
        Event::Stored(Stored { parent: Some(300), ..stored(&blocks, &tokens, TierSet::PINNED) }),
        Event::Removed { blocks: many, tiers: TierSet::NVME, group: None },
        Event::Removed { blocks: vec![1], tiers: TierSet::NVME, group: None },
        Event::Cleared,
    ];
    assert_eq!(decode(&encoded), Ok(Batch { seconds: 1.5, events: expected, rank: Some(3) }));
    let numbers: Vec<u64> = (0..64).flat_map(|bit| [(1 << bit) - 1, 1 << bit, u64::MAX >> bit]).collect();
    let long: Vec<u64> = (0..70_000).collect();
    for blocks in [numbers, long] {
        let encoded = encode(0.0, &[Move::Removed { blocks: &blocks, medium: Medium::Disk }], None);
        assert_eq!(
            (encoded[0], encoded.last()),
            (0x93, Some(&0xc0)),
            "Dynamo's decoder wants the rank, if only nil"
        );
        let events = decode(&encoded).unwrap().events;
        assert_eq!(events, [Event::Removed { blocks, tiers: TierSet::NVME, group: None }]);
    }
}

/// A message that was cut could be taken for a shorter one; one with something behind it for itself.
#[test]
fn a_cut_or_longer_message_is_refused() {
    for whole in vectors() {
        for length in 0..whole.len() {
            assert!(decode(&whole[..length]).is_err(), "cut at {length}");
            assert!(decode_dynamo(&whole[..length]).is_err(), "cut at {length}");
        }
        let longer = [&whole[..], &[0xc0]].concat();
        let left = Err(BadEvents::Left { bytes: 1 });
        assert!(decode(&longer).map(|_| ()) == left || decode_dynamo(&longer).map(|_| ()) == left);
    }
}

/// Bytes that decoding keeps, with what vectors reserve.
fn kept(event: &Event) -> usize {
    match event {
        Event::Stored(stored) => {
            8 * stored.blocks.capacity()
                + match &stored.content {
                    Content::Unknown => 0,
                    Content::Tokens(tokens) => 4 * tokens.capacity(),
                    Content::Hashes(hashes) => 8 * hashes.capacity(),
                }
        }
        Event::Removed { blocks, .. } => 8 * blocks.capacity(),
        Event::Cleared => 0,
    }
}

/// The events that grow most: of the fewest bytes, one more than a doubling holds, and of the shortest hashes.
#[test]
fn the_smallest_events_keep_within_the_promise() {
    let count = EVENTS_MAX / 2 + 1;
    let head = bytes("92 cb0000000000000000 dd 00008001");
    let cleared = [&[0x91, 0xb0][..], b"AllBlocksCleared"].concat();
    let removed = [&[0x92, 0xac][..], b"BlockRemoved", &[0x91, 1]].concat();
    for event in [cleared, removed] {
        let input = [&head[..], &event.repeat(count)].concat();
        let events = decode(&input).unwrap().events;
        assert_eq!(events.len(), count);
        let bytes = events.iter().map(kept).sum::<usize>() + events.capacity() * size_of::<Event>();
        assert!(bytes <= 16 * input.len(), "{bytes} bytes of {}", input.len());
    }
}

/// Anything may come from a network: bytes at random, and true messages with some of them changed, most of them
/// to heads of lists and maps. Nothing may panic, or keep much more than it was given.
#[test]
fn hostile_bytes_neither_panic_nor_grow() {
    let vectors = vectors();
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    };
    let (mut good, mut bad) = (0, 0);
    for round in 0..300_000 {
        let mut input = vectors[random(vectors.len())].clone();
        if round % 4 == 0 {
            input = (0..random(64)).map(|_| u8::try_from(random(256)).unwrap()).collect();
        }
        for _ in 0..random(4) {
            if !input.is_empty() {
                let at = random(input.len());
                input[at] =
                    u8::try_from(if random(2) == 0 { 0x80 + random(0x80) } else { random(256) }).unwrap();
            }
        }
        let engine = decode(&input).map(|batch| batch.events);
        let dynamo = decode_dynamo(&input).map(|list| list.into_iter().map(|one| one.event).collect());
        for result in [engine, dynamo] {
            match result {
                Ok::<Vec<Event>, _>(events) => {
                    good += 1;
                    let bytes =
                        events.iter().map(kept).sum::<usize>() + events.capacity() * size_of::<Event>();
                    assert!(
                        bytes <= 16 * input.len() + 1024,
                        "round {round}: {bytes} bytes of {}",
                        input.len()
                    );
                }
                Err(_) => bad += 1,
            }
        }
    }
    assert!(good > 10_000 && bad > 10_000, "{good} read, {bad} refused");
}

/// A list could promise more items than there are bytes, and memory be set aside for them.
#[test]
fn promises_are_held_against_the_bytes_that_are_left() {
    let cut = |bytes: &[u8]| {
        assert_eq!(Reader::new(bytes).next(), Err(BadEvents::Cut { at: bytes.len() }), "{bytes:x?}");
    };
    cut(&[0xdd, 0xff, 0xff, 0xff, 0xff]);
    cut(&[0xdd, 0, 0, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8]);
    cut(&[0x93, 1, 2]);
    cut(&[0xdf, 0x80, 0, 0, 0, 1]);
    cut(&[0x82, 1, 2, 3]);
    cut(&[0xdb, 0xff, 0xff, 0xff, 0xff, 1]);
    cut(&[0xc9, 0xff, 0xff, 0xff, 0xff, 1]);
    assert_eq!(Reader::new(&[0x93, 1, 2, 3]).next(), Ok(Value::List(3)));
}

/// Every head of the format is read over by its length, and a deep one ends before the stack does.
#[test]
fn unknown_fields_are_skipped() {
    let first = "9f c0 c2 c3 c40161 c5000161 c60000000161 c7010561 c800010561 c9000000010561 ca00000000 \
                 cb0000000000000000 d0ff d1ffff d2ffffffff d3ffffffffffffffff";
    let second = "9f d40561 d5056161 d90161 da000161 db0000000161 de0001c0c0 df00000001c0c0 dc0001c0 \
                  dd00000001c0 cc01 cd0001 ce00000001 cf0000000000000001 e0 7f";
    for all in [bytes(first), bytes(second)] {
        let mut reader = Reader::new(&all);
        assert_eq!(reader.skip(), Ok(Skipped::Something));
        assert_eq!(reader.end(), Ok(()));
    }
    assert_eq!(Reader::new(&bytes("9392c0a081a17390")).skip(), Err(BadEvents::Cut { at: 8 }));
    assert_eq!(Reader::new(&bytes("9292c0a081a173c0")).skip(), Ok(Skipped::Nothing));
    assert!(matches!(Reader::new(&[0xc1]).skip(), Err(BadEvents::Kind { at: 0, .. })));
    let deep = |levels: usize| [vec![0x91; levels], vec![0xc0]].concat();
    assert_eq!(Reader::new(&deep(DEPTH_MAX)).skip(), Ok(Skipped::Nothing));
    let at = DEPTH_MAX;
    assert_eq!(
        Reader::new(&deep(1 << 20)).skip(),
        Err(BadEvents::TooMany { at, what: "levels", limit: DEPTH_MAX })
    );
}

/// Whoever looks for what went wrong must be told the word or the field; limits must hold to the last item.
#[test]
fn refusals_say_what_is_wrong() {
    let refused = |hex: &str, tail: &[u8]| decode(&[&bytes(hex)[..], tail].concat()).unwrap_err();
    let batch = "92cb000000000000000091";
    let removed = [&[0x93, 0xac][..], b"BlockRemoved"].concat();
    let with = |rest: &[u8]| refused(batch, &[&removed[..], rest].concat());
    let tape = with(b"\x90\xa4TAPE");
    assert_eq!(tape, BadEvents::Unknown { at: 26, what: "the medium", word: "TAPE".to_owned() });
    assert_eq!(tape.to_string(), "at byte 26: the medium `TAPE` is unknown");
    let gone = refused(batch, b"\x91\xa4Gone");
    assert_eq!(gone, BadEvents::Unknown { at: 12, what: "the event", word: "Gone".to_owned() });
    assert_eq!(with(b"\x91\xc4\x01a\xc0"), BadEvents::Kind { at: 26, wanted: "a block's hash" });
    assert_eq!(with(b"\xc0\xc0"), BadEvents::Missing { at: 27, field: "block_hashes" });
    assert_eq!(refused(batch, b"\x80"), BadEvents::Missing { at: 12, field: "type" });
    assert_eq!(refused("91c0", b""), BadEvents::Kind { at: 0, wanted: "a batch of time and events" });
    let many = |count: usize| {
        let head = u32::try_from(count).unwrap().to_be_bytes();
        [&[0xdd][..], &head, &vec![0; count], &[0xc0]].concat()
    };
    let limit = BLOCKS_MAX;
    assert_eq!(with(&many(limit + 1)), BadEvents::TooMany { at: 25, what: "blocks", limit });
    let fits = decode(&[&bytes(batch)[..], &removed, &many(limit)].concat()).unwrap();
    assert_eq!(fits.events.len(), 1);
    let long = vec![0xc0; BATCH_BYTES_MAX + 1];
    let limit = BATCH_BYTES_MAX;
    assert_eq!(decode(&long).unwrap_err(), BadEvents::TooMany { at: 0, what: "bytes", limit });
    let changed = |from: &[u8], to: &[u8]| {
        let mut bytes = bytes(DYNAMO_CLEARED);
        let at = bytes.windows(from.len()).rposition(|window| window == from).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to);
        match decode_dynamo(&bytes).unwrap_err() {
            BadEvents::Unknown { what, word, .. } => format!("{what} {word}"),
            BadEvents::Missing { field, .. } => field.to_owned(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(changed(b"device", b"heaven"), "the tier heaven");
    assert_eq!(changed(b"worker", b"nobody"), "the domain nobody");
    assert_eq!(changed(b"cleared", b"painted"), "the event painted");
    assert_eq!(changed(b"worker_id", b"worker_no"), "worker_id");
    assert_eq!(changed(b"event_id", b"event_no"), "event_id");
}
