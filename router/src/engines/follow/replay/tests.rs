//! A publisher of our own sockets, whose answers break off where a test says.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use tempfile::TempDir;
use terrace_index::events::{Medium, Move, encode};
use terrace_index::{Found, Index, Key, Limits};
use tokio::time::timeout;

use super::*;
use crate::engines::ENGINE_HOLDERS_MAX;
use crate::engines::follow::round;
use crate::engines::holders::Holders;
use crate::names::Names;
use crate::zmtp::address::Listener;
use crate::zmtp::link::{self, Sent};

/// Batches that a publisher remembers, of one block each.
const BATCHES: u64 = 10;
/// Two processes with the same numbers and other blocks.
const LIVES: [u64; 2] = [1000, 2000];
const PATIENCE: Duration = Duration::from_secs(20);
const TIMES: Times = Times {
    answer: Duration::from_secs(1),
    silence: Duration::from_millis(300),
    pause_min: Duration::from_millis(1),
    pause_max: Duration::from_millis(1),
};

/// How a question is answered.
#[derive(Clone, Copy)]
enum Answer {
    /// With so many batches; what comes after them is thrown away, the mark of the end too.
    Room(usize),
    /// With all.
    Whole,
    /// With all, by another process.
    Other,
    /// Not at all: the connection ends.
    Closed,
}

struct Engine {
    folder: TempDir,
    replay: Address,
    listener: Listener,
    asked: Vec<u64>,
    answers: VecDeque<Answer>,
}

fn payload(life: u64, number: u64) -> Vec<u8> {
    let (block, parent) = (life + number, (number > 0).then(|| life + number - 1));
    let (blocks, medium) = (&[block][..], Medium::CpuPinned);
    encode(1.0, &[Move::Stored { parent, blocks, tokens: &[], block_size: 16, medium }], None)
}

impl Engine {
    async fn new(answers: impl IntoIterator<Item = Answer>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let replay = Address::Ipc(folder.path().join("replay"));
        let listener = replay.listen().await.unwrap();
        Self { folder, replay, listener, asked: Vec::new(), answers: answers.into_iter().collect() }
    }

    /// Answers while the router asks. Fails if it asks less than it is answered.
    async fn answers(&mut self, asking: impl Future<Output = ()>) {
        let both = async { tokio::join!(asking, self.answer()) };
        timeout(PATIENCE, both).await.expect("there are questions for all answers");
    }

    /// Answers one question after the other until there is no more to answer.
    async fn answer(&mut self) {
        while let Some(answer) = self.answers.pop_front() {
            let stream = self.listener.accept().await.unwrap();
            let (life, room) = match answer {
                Answer::Room(room) => (LIVES[0], room),
                Answer::Whole => (LIVES[0], usize::MAX),
                Answer::Other => (LIVES[1], usize::MAX),
                Answer::Closed => continue,
            };
            let (mut reader, mut writer) = link::open(stream, Kind::Router).await.unwrap();
            let Sent::Message(question) = reader.next().await.unwrap() else { panic!("it asks") };
            let from = u64::from_be_bytes(question[1][..].try_into().unwrap());
            self.asked.push(from);
            let batches = (from..BATCHES).map(|number| (number, payload(life, number)));
            for (number, payload) in batches.chain([(REPLAY_END, Vec::new())]).take(room) {
                let number = Bytes::copy_from_slice(&number.to_be_bytes());
                // Whoever has heard enough closes the connection.
                let message = [Bytes::new(), Bytes::new(), number, payload.into()];
                let _ = writer.send_message(&message).await;
            }
            assert!(reader.next().await.is_err(), "one question by each connection");
        }
    }
}

fn topics() -> Topics {
    let index = Arc::new(Index::new(Limits { holders: 4 + ENGINE_HOLDERS_MAX, bytes: 4 << 20 }));
    let holders = Arc::new(Holders::new(index, 4, Arc::new(Names::new(0))));
    let spec = Arc::new("name=v,connect=tcp://127.0.0.1:1".parse().unwrap());
    Topics { spec, holders, shown: Arc::default(), publishers: BTreeMap::new(), lacks_start: false }
}

fn replay(address: &Address) -> Replay<'_> {
    Replay { times: TIMES, ..Replay::new(address) }
}

/// How many of a life's blocks are known, from the first on.
fn known(topics: &Topics, life: u64) -> u32 {
    let keys: Vec<Key> = (0..BATCHES).map(|number| Key::from_alias(life + number)).collect();
    let mut found = Found::new();
    topics.holders.index().find(&keys, &mut found);
    found.holders().first().map_or(0, |held| held.prefix[2])
}

fn forgotten(topics: &Topics) -> u64 {
    topics.shown.row().forgotten
}

/// A publisher's socket throws away the end of an answer if the router reads too slowly. The router would wait for it,
/// forget all that it was told and never ask again: it asks for the rest, behind what it has.
#[tokio::test]
async fn an_answer_that_breaks_off_is_followed_by_a_question_for_the_rest() {
    let mut engine = Engine::new([Answer::Room(4), Answer::Room(4), Answer::Whole]).await;
    let (address, mut topics) = (engine.replay.clone(), topics());
    let mut replay = replay(&address);
    engine.answers(replay.catch_up(&mut topics)).await;
    assert_eq!((known(&topics, LIVES[0]), forgotten(&topics)), (10, 0));
    assert_eq!(engine.asked, [0, 3, 6], "each answer begins with the last batch of the one before");
    assert!(replay.due.is_none(), "all was had");
}

/// Of an engine that is not heard to its end, the begin is certain: it stays, and the rest is asked for later.
#[tokio::test]
async fn what_was_had_stays_and_the_rest_is_asked_for_later() {
    let mut engine = Engine::new([Answer::Room(4), Answer::Room(1)]).await;
    let (address, mut topics) = (engine.replay.clone(), topics());
    let mut replay = replay(&address);
    engine.answers(replay.catch_up(&mut topics)).await;
    assert_eq!((known(&topics, LIVES[0]), forgotten(&topics)), (4, 0));
    assert!(replay.due.is_some());
    // Whoever is asked whether it is the same answers by all that it has as well.
    engine.answers = [Answer::Whole, Answer::Whole].into();
    engine.answers(replay.catch_up(&mut topics)).await;
    assert_eq!((known(&topics, LIVES[0]), forgotten(&topics)), (10, 0));
    assert_eq!(engine.asked, [0, 3, 3, 4]);
    assert!(replay.due.is_none(), "all was had");
}

/// The publisher dies in the middle of an answer and another process takes its address, with numbers that fit: blocks
/// of both would be credited to it.
#[tokio::test]
async fn another_process_does_not_go_on_where_the_first_broke_off() {
    let mut engine = Engine::new([Answer::Room(4), Answer::Other]).await;
    let (address, mut topics) = (engine.replay.clone(), topics());
    let mut replay = replay(&address);
    engine.answers(replay.catch_up(&mut topics)).await;
    assert_eq!(known(&topics, LIVES[1]), 0, "the first one's blocks are known, or none");
    engine.answers = [Answer::Other, Answer::Other].into();
    engine.answers(replay.catch_up(&mut topics)).await;
    assert_eq!((known(&topics, LIVES[0]), known(&topics, LIVES[1])), (0, 10));
    assert_eq!(forgotten(&topics), 1);
}

/// Batches are missing and the replay brings none of them: what is known is not believed any more, and the engine's
/// new batches count at once. What came before them would never be known: it is asked for again.
#[tokio::test]
async fn a_gap_that_cannot_be_filled_costs_what_came_before_for_a_while_only() {
    let mut engine = Engine::new([Answer::Whole, Answer::Room(0)]).await;
    let (address, mut topics) = (engine.replay.clone(), topics());
    let mut replay = replay(&address);
    let early = |number| Batch { topic: Bytes::new(), number, payload: payload(LIVES[0], number).into() };
    let gap = async {
        replay.catch_up(&mut topics).await;
        replay.fill(&mut topics, &early(BATCHES + 2), BATCHES).await;
    };
    engine.answers(gap).await;
    assert_eq!((known(&topics, LIVES[0]), forgotten(&topics)), (0, 1));
    assert_eq!(topics.last(&Bytes::new()), Some(BATCHES + 2), "the early one counts");
    assert!(replay.due.is_some());
    // A socket that says nothing again costs nothing more.
    engine.answers = [Answer::Room(0)].into();
    engine.answers(replay.catch_up(&mut topics)).await;
    assert_eq!(topics.last(&Bytes::new()), Some(BATCHES + 2));
    engine.answers = [Answer::Whole, Answer::Whole].into();
    engine.answers(replay.catch_up(&mut topics)).await;
    assert_eq!((known(&topics, LIVES[0]), replay.due.is_none()), (10, true));
}

/// Batches are missing and a part of them can be had: that part stays, and the one that came too early waits for
/// the rest, or blocks in between would be credited wrongly.
#[tokio::test]
async fn a_gap_that_is_filled_in_part_stays_certain() {
    let mut engine = Engine::new([Answer::Room(2), Answer::Room(1)]).await;
    let (address, mut topics) = (engine.replay.clone(), topics());
    let mut replay = replay(&address);
    for number in 0..3 {
        topics.publisher(&Bytes::new()).unwrap().take(number, &payload(LIVES[0], number));
    }
    let early = Batch { topic: Bytes::new(), number: 9, payload: payload(LIVES[0], 9).into() };
    engine.answers(replay.fill(&mut topics, &early, 3)).await;
    assert_eq!((known(&topics, LIVES[0]), forgotten(&topics)), (5, 0));
    engine.answers = [Answer::Whole].into();
    engine.answers(replay.fill(&mut topics, &early, 5)).await;
    assert_eq!((known(&topics, LIVES[0]), forgotten(&topics), replay.due.is_none()), (10, 0, true));
}

/// An engine that has nothing new to tell, and whose replay socket did not answer when the router came, would stay
/// unknown until its next connection.
#[tokio::test]
async fn a_replay_that_failed_is_had_without_anything_new() {
    let mut engine = Engine::new([Answer::Closed, Answer::Whole]).await;
    let (address, mut topics) = (engine.replay.clone(), topics());
    let events = Address::Ipc(engine.folder.path().join("events"));
    let publisher = events.listen().await.unwrap();
    let quiet = async {
        let (mut reader, _writer) = link::open(publisher.accept().await.unwrap(), Kind::Pub).await.unwrap();
        assert!(matches!(reader.next().await, Ok(Sent::Subscribe(_))));
        reader.next().await
    };
    let followed = async {
        tokio::select! {
            ended = round(&mut topics, &events, Some(&address)) => panic!("{ended}"),
            said = quiet => panic!("{said:?}"),
            () = engine.answer() => {}
        }
    };
    timeout(PATIENCE, followed).await.expect("it is asked again");
    assert_eq!((known(&topics, LIVES[0]), engine.asked), (10, vec![0]));
}
