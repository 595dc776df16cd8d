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

-- A session row counts its turns and tool calls, and remembers its last turn.
CREATE FUNCTION count_session_events() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE sessions
    SET turn_count = sessions.turn_count + added.turns,
        tool_call_count = sessions.tool_call_count + added.tool_calls,
        last_turn_status = coalesce(added.last_turn_status, sessions.last_turn_status),
        last_turn_at = coalesce(added.last_turn_at, sessions.last_turn_at),
        last_turn_sequence = coalesce(added.last_turn_sequence, sessions.last_turn_sequence)
    FROM (
        SELECT session_id,
               count(*) FILTER (WHERE event_type LIKE 'turn.%') AS turns,
               count(*) FILTER (WHERE event_type = 'tool.completed') AS tool_calls,
               (array_agg(split_part(event_type, '.', 2) ORDER BY sequence DESC)
                   FILTER (WHERE event_type LIKE 'turn.%'))[1] AS last_turn_status,
               (array_agg(ts ORDER BY sequence DESC)
                   FILTER (WHERE event_type LIKE 'turn.%'))[1] AS last_turn_at,
               max(sequence) FILTER (WHERE event_type LIKE 'turn.%') AS last_turn_sequence
        FROM inserted
        WHERE event_type IN ('turn.completed', 'turn.failed', 'turn.cancelled', 'tool.completed')
        GROUP BY session_id
    ) AS added
    WHERE sessions.id = added.session_id;
    RETURN NULL;
END
$$;

CREATE TRIGGER count_session_events AFTER INSERT ON events
REFERENCING NEW TABLE AS inserted
FOR EACH STATEMENT EXECUTE FUNCTION count_session_events();
