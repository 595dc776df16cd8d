-- The platform's triggers: what happens to its tables without anybody asking.

CREATE FUNCTION set_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END
$$;

CREATE TRIGGER set_updated_at BEFORE UPDATE ON sessions
FOR EACH ROW EXECUTE FUNCTION set_updated_at();
CREATE TRIGGER set_updated_at BEFORE UPDATE ON agents
FOR EACH ROW EXECUTE FUNCTION set_updated_at();
CREATE TRIGGER set_updated_at BEFORE UPDATE ON harnesses
FOR EACH ROW EXECUTE FUNCTION set_updated_at();
CREATE TRIGGER set_updated_at BEFORE UPDATE ON reporting_outbox
FOR EACH ROW EXECUTE FUNCTION set_updated_at();

-- Events are append-only. Retention and session purge say so in their transaction.
CREATE FUNCTION refuse_event_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND (
        current_setting('app.archival_bypass', true) = 'true'
        OR current_setting('app.session_purge', true) = 'true'
    ) THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION 'events are append-only: % refused', TG_OP
        USING ERRCODE = 'restrict_violation';
END
$$;

CREATE TRIGGER refuse_event_change BEFORE UPDATE OR DELETE ON events
FOR EACH ROW EXECUTE FUNCTION refuse_event_change();

-- A session row counts its turns and tool calls, and remembers its last turn. It does so once per
-- turn, when that ends: by the tool calls since the turn before.
CREATE FUNCTION is_turn_end(event_type text) RETURNS boolean LANGUAGE sql IMMUTABLE
RETURN event_type IN ('turn.completed', 'turn.failed', 'turn.cancelled');

CREATE FUNCTION count_turn() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    turn_before integer;
BEGIN
    SELECT max(sequence) INTO turn_before FROM events
    WHERE session_id = NEW.session_id AND sequence < NEW.sequence AND is_turn_end(event_type);
    UPDATE sessions
    SET turn_count = turn_count + 1,
        tool_call_count = tool_call_count + (
            SELECT count(*) FROM events
            WHERE session_id = NEW.session_id AND event_type = 'tool.completed'
                AND sequence > coalesce(turn_before, -1) AND sequence < NEW.sequence
        )
    WHERE id = NEW.session_id;
    UPDATE sessions
    SET last_turn_status = split_part(NEW.event_type, '.', 2),
        last_turn_at = NEW.ts,
        last_turn_sequence = NEW.sequence
    WHERE id = NEW.session_id AND coalesce(last_turn_sequence, -1) < NEW.sequence;
    RETURN NULL;
END
$$;

CREATE TRIGGER count_turn AFTER INSERT ON events
FOR EACH ROW WHEN (is_turn_end(NEW.event_type)) EXECUTE FUNCTION count_turn();

-- Retention takes away what has been counted.
CREATE FUNCTION uncount_events() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE sessions
    SET turn_count = greatest(turn_count - deleted.turns, 0),
        tool_call_count = greatest(tool_call_count - deleted.tool_calls, 0),
        (last_turn_status, last_turn_at, last_turn_sequence) = (
            SELECT split_part(event_type, '.', 2), ts, sequence FROM events
            WHERE session_id = sessions.id AND is_turn_end(event_type)
            ORDER BY sequence DESC
            LIMIT 1
        )
    FROM (
        SELECT
            session_id,
            count(*) FILTER (WHERE is_turn_end(event_type)) AS turns,
            count(*) FILTER (WHERE event_type = 'tool.completed') AS tool_calls
        FROM removed
        WHERE is_turn_end(event_type) OR event_type = 'tool.completed'
        GROUP BY session_id
    ) AS deleted
    WHERE sessions.id = deleted.session_id;
    RETURN NULL;
END
$$;

CREATE TRIGGER uncount_events AFTER DELETE ON events
REFERENCING OLD TABLE AS removed
FOR EACH STATEMENT EXECUTE FUNCTION uncount_events();
